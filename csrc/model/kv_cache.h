/* Keys and values of a batch of generations.
 *
 * Every prompt is stored once (the prefix), however many beams read it; each running row stores only what it
 * generated (its suffix), one cache row per step. Which suffix rows a beam reads is a list of slots, so a beam that
 * changes its parent copies a list of integers and never a key:
 *     rows of k[layer], v[layer]:  [ prompts, packed | step 0: R rows | step 1: R rows | ... ]
 *     bytes = 2 * layers * (prefix tokens + R * steps) * width * 4
 * Memory is touched as steps are taken: what is never generated costs no physical page. */
#ifndef B2_MODEL_KV_CACHE_H
#define B2_MODEL_KV_CACHE_H

#include "core/tensor.h"
#include "core/error.h"

typedef struct b2_kv_cache {
    int layers;
    int64_t width;          /* Hkv * Dh */
    int64_t prefix_tokens;  /* N of all prompts */
    int64_t running;        /* R = B * beams */
    int64_t steps;          /* suffix capacity */
    int64_t rows;           /* prefix_tokens + running * steps */
    float *k, *v;           /* [layers, rows, width], owned */
} b2_kv_cache;

int b2_kv_cache_create(b2_kv_cache *cache, int layers, int64_t width, int64_t prefix_tokens, int64_t running,
                       int64_t steps, b2_err *err);
void b2_kv_cache_release(b2_kv_cache *cache);

/* [rows, width] of one layer. */
b2_tensor b2_kv_cache_keys(const b2_kv_cache *cache, int layer);
b2_tensor b2_kv_cache_values(const b2_kv_cache *cache, int layer);

/* Where running row r stores its token of suffix step s. */
static inline int32_t b2_kv_cache_slot(const b2_kv_cache *cache, int64_t step, int64_t r)
{
    return (int32_t)(cache->prefix_tokens + step * cache->running + r);
}

/* Bytes in use after `steps_taken` suffix steps. */
int64_t b2_kv_cache_bytes(const b2_kv_cache *cache, int64_t steps_taken);

#endif
