/* What the attention kernels share: the arguments as they lie on the device, and which keys a query sees.
 *
 * attention.cu chooses a kernel for each row by that row's own lengths:
 *     few queries (a decoded token)     attention_few.cu       fp32
 *     many queries                      attention_tiles.cu     fp32
 *     many queries, operands rounded    attention_pictures.cu  tensor cores, fp32 sums
 *     heads wider than 128              attention_wide.cu      fp32, slow
 * Same bits: an output row depends on its own keys, queries and options alone, not on the other rows of the call, on how
 * many blocks run, or on whether the call is recorded. It does depend on which of the kernels its length chooses. */
#ifndef B2_OPS_CUDA_ATTENTION_H
#define B2_OPS_CUDA_ATTENTION_H

#include <cuda_fp16.h>

#include "ops/cuda/cuda.h"

enum {
    B2_ATTENTION_FEW = 8,     /* queries of a row that the kernel for few of them takes */
    B2_ATTENTION_WIDEST = 128 /* head width that the fast kernels take */
};

/* b2_attention_args on the device; everything by value stays the same when a recorded step is repeated. */
struct b2_attention_view {
    float *out;
    const float *q;
    const void *k, *v, *k_suffix, *v_suffix; /* of `keys` */
    b2_dtype keys;                /* float32, float16 or bfloat16 */
    int64_t out_ld, q_ld, k_ld, v_ld, k_suffix_ld, v_suffix_ld;
    int64_t rows;
    const int32_t *q_offsets;     /* [B + 1] */
    const int32_t *prefix_starts; /* [B] */
    const int32_t *prefix_lens;   /* [B] */
    const int32_t *suffix_slots;  /* [B, suffix_ld] */
    int64_t suffix_ld;
    const int32_t *suffix_lens;   /* [B] or NULL */
    const uint8_t *key_mask;      /* [B, key_mask_ld] or NULL */
    int64_t key_mask_ld;
    const float *distance_bias;   /* [H, 2L - 1] or NULL */
    int64_t distance_last;        /* L - 1 */
    int64_t window;
    float scale;
    int causal, heads, kv_heads, head_dim;
    int by_four;                  /* 1: all rows may be read and written four floats at a time */
};

/* One row of the batch. */
struct b2_attention_row {
    int64_t row;
    int first_query, queries, prefix, keys; /* T; keys of the prefix and of both stretches */
    int64_t prefix_start;
};

static __device__ __forceinline__ b2_attention_row b2_attention_row_of(const b2_attention_view &a, int64_t row)
{
    b2_attention_row r;
    r.row = row;
    r.first_query = a.q_offsets[row];
    r.queries = a.q_offsets[row + 1] - r.first_query;
    r.prefix = a.prefix_lens[row];
    r.prefix_start = a.prefix_starts[row];
    r.keys = r.prefix + (a.suffix_lens ? a.suffix_lens[row] : 0);
    return r;
}

/* The row that query token n belongs to. */
static __device__ __forceinline__ int64_t b2_attention_find_row(const b2_attention_view &a, int64_t token)
{
    int64_t low = 0, high = a.rows - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (a.q_offsets[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Elements of 16 bits that keys and values may be kept in. */
struct b2_half_key {
    uint16_t bits;
};
struct b2_bfloat_key {
    uint16_t bits;
};

static __device__ __forceinline__ float b2_key_float(float key)
{
    return key;
}

static __device__ __forceinline__ float b2_key_float(b2_half_key key)
{
    return __half2float(__ushort_as_half(key.bits));
}

static __device__ __forceinline__ float b2_key_float(b2_bfloat_key key)
{
    return __uint_as_float((unsigned)key.bits << 16);
}

/* Where key j of the row lies: key and value of the row's first head. K: what view.keys says. */
template <class K>
static __device__ __forceinline__ void b2_attention_find_key(const b2_attention_view &a, const b2_attention_row &r, int j,
                                                             const K **key, const K **value)
{
    if (j < r.prefix) {
        *key = (const K *)a.k + (r.prefix_start + j) * a.k_ld;
        *value = (const K *)a.v + (r.prefix_start + j) * a.v_ld;
        return;
    }
    int64_t slot = a.suffix_slots[r.row * a.suffix_ld + j - r.prefix];
    *key = (const K *)a.k_suffix + slot * a.k_suffix_ld;
    *value = (const K *)a.v_suffix + slot * a.v_suffix_ld;
}

static __device__ __forceinline__ int b2_attention_shown(const b2_attention_view &a, const b2_attention_row &r, int j)
{
    return !a.key_mask || a.key_mask[r.row * a.key_mask_ld + j];
}

/* Of the keys, query i may see [first, end), less those that the mask hides. */
static __device__ __forceinline__ int b2_attention_end(const b2_attention_view &a, const b2_attention_row &r, int i)
{
    return a.causal ? r.keys - r.queries + i + 1 : r.keys;
}

static __device__ __forceinline__ int b2_attention_first(const b2_attention_view &a, const b2_attention_row &r, int i)
{
    int64_t first = a.window > 0 ? r.keys - r.queries + i + 1 - a.window : 0;
    return first > 0 ? (int)(first < r.keys ? first : r.keys) : 0;
}

static __device__ __forceinline__ float b2_attention_bias(const b2_attention_view &a, const b2_attention_row &r, int head,
                                                          int i, int j)
{
    int64_t distance = (int64_t)j - (r.keys - r.queries + i), last = a.distance_last;
    distance = distance < -last ? -last : distance > last ? last : distance;
    return a.distance_bias[head * (2 * last + 1) + last + distance];
}

/* What exponents are taken relative to: the largest score, or 0 while no key has been seen. */
static __device__ __forceinline__ float b2_attention_reference(float most)
{
    return most == -INFINITY ? 0.0f : most;
}

/* Four elements from column d of a row of `width`; zero behind its end. */
static __device__ __forceinline__ float4 b2_attention_load(const float *row, int d, int width, int by_four)
{
    if (by_four && d < width)
        return *(const float4 *)(row + d);
    return make_float4(d < width ? row[d] : 0.0f, d + 1 < width ? row[d + 1] : 0.0f, d + 2 < width ? row[d + 2] : 0.0f,
                       d + 3 < width ? row[d + 3] : 0.0f);
}

template <class K> static __device__ __forceinline__ float4 b2_attention_load_halves(const K *row, int d, int width, int by_four)
{
    if (by_four && d < width) {
        uint2 x = *(const uint2 *)(row + d);
        K a = {(uint16_t)x.x}, b = {(uint16_t)(x.x >> 16)}, c = {(uint16_t)x.y}, e = {(uint16_t)(x.y >> 16)};
        return make_float4(b2_key_float(a), b2_key_float(b), b2_key_float(c), b2_key_float(e));
    }
    return make_float4(d < width ? b2_key_float(row[d]) : 0.0f, d + 1 < width ? b2_key_float(row[d + 1]) : 0.0f,
                       d + 2 < width ? b2_key_float(row[d + 2]) : 0.0f, d + 3 < width ? b2_key_float(row[d + 3]) : 0.0f);
}

static __device__ __forceinline__ float4 b2_attention_load(const b2_half_key *row, int d, int width, int by_four)
{
    return b2_attention_load_halves(row, d, width, by_four);
}

static __device__ __forceinline__ float4 b2_attention_load(const b2_bfloat_key *row, int d, int width, int by_four)
{
    return b2_attention_load_halves(row, d, width, by_four);
}

/* Each enqueues its kernel for the rows that are its own. */
int b2_attention_few(b2_ctx *ctx, const b2_attention_view *view, int64_t tokens, int64_t most_keys, b2_err *err);
int b2_attention_tiles(b2_ctx *ctx, const b2_attention_view *view, int64_t most_queries, b2_err *err);
int b2_attention_pictures(b2_ctx *ctx, const b2_attention_view *view, int64_t most_queries, b2_dtype operands, b2_err *err);
int b2_attention_wide(b2_ctx *ctx, const b2_attention_view *view, int64_t tokens, b2_err *err);
/* offsets [B]: where each row's weights begin. */
int b2_attention_weigh(b2_ctx *ctx, const b2_attention_view *view, float *weights, const int64_t *offsets, int64_t tokens,
                       b2_err *err);
/* Bytes that b2_attention_few takes from ctx->activations at most. */
size_t b2_attention_few_scratch(const b2_ctx *ctx);

#endif
