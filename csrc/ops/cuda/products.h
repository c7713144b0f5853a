/* What the files of products share: linear.cu chooses, few_rows.cu, few_floats.cu, tiles.cu, float_tiles.cu and cublas.cu
 * compute.
 *
 * out [rows, n] = act(x [rows, k] . w^T + bias) + residual, w in B2_STRIDED. All pointers are device memory. */
#ifndef B2_OPS_CUDA_PRODUCTS_H
#define B2_OPS_CUDA_PRODUCTS_H

#include "ops/cuda/act.h"
#include "ops/cuda/cuda.h"

/* A kernel's argument. */
struct b2_product {
    float *out;                 /* [rows, n] */
    const float *x;             /* [rows, k] */
    const void *w;              /* [n, ld] */
    const void *scales;         /* I8: F32 [n]; I4: F16 [n, ld / 32] */
    const float *column_scales; /* [k] or NULL */
    const float *bias;          /* [n] or NULL */
    const float *residual;      /* [rows, n] or NULL; may be `out` */
    int64_t out_ld, x_ld, residual_ld;
    int rows, n, k, ld;
    int act;
    int aligned;                /* 1: rows of x begin at multiples of 16 bytes */
};

/* Rows rounded to 16 bits for the tensor cores. */
struct b2_rounded {
    const uint16_t *x;   /* [rows, ld] float16 or bfloat16, zero from column k on; for I4 in b2_int4_order */
    const float *scales; /* [rows], powers of two: x[i][j] * scales[i] is the activation; NULL: ones */
};

enum {
    B2_CUDA_FEW_ROWS = 16,
    B2_CUDA_GROUP = 32 /* columns that share a scale in I4 */
};

static inline int b2_div_up(int64_t a, int64_t b)
{
    return (int)((a + b - 1) / b);
}

static inline int b2_least(int64_t a, int64_t b)
{
    return (int)(a < b ? a : b);
}

static inline b2_product b2_product_rows(b2_product p, int first, int rows)
{
    p.out += first * p.out_ld;
    p.x += first * p.x_ld;
    p.residual = p.residual ? p.residual + first * p.residual_ld : NULL;
    p.rows = rows;
    return p;
}

/* The end of a product for one element: the same instructions in every kernel, so that the ways there agree. */
static __device__ __forceinline__ void b2_finish(const b2_product &p, int row, int column, float value, float scale)
{
    value = __fmul_rn(value, scale);
    if (p.bias)
        value = __fadd_rn(value, p.bias[column]);
    value = b2_cuda_act(value, p.act);
    if (p.residual)
        value = __fadd_rn(value, p.residual[row * p.residual_ld + column]);
    p.out[row * p.out_ld + column] = value;
}

/* x[row][column .. column + 4), times the column scales; zeros from k on. */
static __device__ __forceinline__ float4 b2_load_x(const b2_product &p, int row, int column)
{
    const float *x = p.x + row * p.x_ld + column;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (p.aligned && column + 4 <= p.k) {
        v = *(const float4 *)x;
    } else {
        v.x = column < p.k ? x[0] : 0.0f;
        v.y = column + 1 < p.k ? x[1] : 0.0f;
        v.z = column + 2 < p.k ? x[2] : 0.0f;
        v.w = column + 3 < p.k ? x[3] : 0.0f;
    }
    if (p.column_scales) {
        const float *c = p.column_scales + column;
        v.x = column < p.k ? v.x * c[0] : 0.0f;
        v.y = column + 1 < p.k ? v.y * c[1] : 0.0f;
        v.z = column + 2 < p.k ? v.z * c[2] : 0.0f;
        v.w = column + 3 < p.k ? v.w * c[3] : 0.0f;
    }
    return v;
}

/* The power of two that brings `most`, the bits of the largest |x| of a row, to [2^14, 2^15): nothing overflows float16, and
 * what becomes subnormal there is 2^-29 of the largest. Its inverse is a number too. 1 where there is a NaN or an Inf. */
static __device__ __forceinline__ void b2_row_scale(float *scale, float *inverse, unsigned most)
{
    unsigned exponent = most >> 23 & 255;
    exponent = exponent == 255 ? 141 : exponent < 15 ? 15 : exponent;
    *scale = __uint_as_float((268 - exponent) << 23);
    *inverse = __uint_as_float((exponent - 14) << 23);
}

static __device__ __forceinline__ unsigned b2_largest(float4 v)
{
    unsigned a = max(__float_as_uint(v.x) & 0x7fffffffu, __float_as_uint(v.y) & 0x7fffffffu);
    unsigned b = max(__float_as_uint(v.z) & 0x7fffffffu, __float_as_uint(v.w) & 0x7fffffffu);
    return max(a, b);
}

/* Bytes left in the arena of activations. */
static inline size_t b2_products_left(const b2_ctx *ctx)
{
    return ctx->activations->size - ctx->activations->used;
}

/* out = finish(the sum of parts [count, rows, n] in ascending order): scales of rows and of output channels (either may be
 * NULL) included. `parts` may be p.out (count 1, out_ld n). */
int b2_products_join(b2_ctx *ctx, const b2_product *p, const float *parts, int count, int64_t part_ld,
                     const float *row_scales, const float *channel_scales, b2_err *err);

/* Up to B2_CUDA_FEW_ROWS rows; F16, BF16, I8, I4. */
int b2_products_few(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, b2_err *err);
/* The most that it likes to take from ctx->activations; it takes what there is. */
size_t b2_products_few_scratch(int64_t max_rows, int64_t max_width);
/* F32 */
int b2_products_few_floats(b2_ctx *ctx, const b2_product *p, b2_err *err);

/* Many rows, own kernels. `p->x` is not read by the first, nor the row scales by the second. */
int b2_products_tiles(b2_ctx *ctx, const b2_product *p, b2_dtype dtype, const b2_rounded *x, b2_err *err);
int b2_products_float_tiles(b2_ctx *ctx, const b2_product *p, b2_err *err);

#endif
