/* Keys and values of every layer, in rows that their owner gives out.
 *
 * A session (session.h) cuts them into one region per place: first the prompt, contiguous and stored once however many
 * beams read it, then W rows per step for what the W running rows of the place have generated:
 *     rows of k[layer], v[layer]:  [ place 0: prompt | step 0: W rows | step 1: W rows | ... ][ place 1: ... ]
 * Which rows of the second part a beam reads is a list of slots, so a beam that changes its parent copies a list of
 * integers and never a key. Memory is touched as it is used: what is never generated costs no physical page. */
#ifndef B2_MODEL_KV_CACHE_H
#define B2_MODEL_KV_CACHE_H

#include "core/memory.h"
#include "core/tensor.h"

typedef struct b2_kv_cache {
    int layers;
    b2_dtype dtype; /* B2_F32; on devices B2_F16 or B2_BF16 too */
    int64_t width; /* Hkv * Dh */
    int64_t rows;
    b2_memory *memory; /* where keys and values lie */
    char *k, *v;   /* [layers, rows, width], owned */
} b2_kv_cache;

/* B2_E_VALUE when a row's number would not fit in 32 bits. */
int b2_kv_cache_create(b2_kv_cache *cache, b2_memory *memory, b2_dtype dtype, int layers, int64_t width, int64_t rows,
                       b2_err *err);
void b2_kv_cache_release(b2_kv_cache *cache);

/* [rows, width] of one layer: of elements of cache->dtype, whatever the pointer says; for those who are told so
 * (b2_attention_args.keys, b2_store_rows). */
b2_tensor b2_kv_cache_keys(const b2_kv_cache *cache, int layer);
b2_tensor b2_kv_cache_values(const b2_kv_cache *cache, int layer);

/* Of one row in all layers. */
static inline int64_t b2_kv_cache_row_bytes(const b2_kv_cache *cache)
{
    return 2 * cache->layers * cache->width * (int64_t)b2_dtype_size(cache->dtype);
}

#endif
