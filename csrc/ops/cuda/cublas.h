/* Large products through NVIDIA's cuBLASLt, opened at run time: the library is no part of blip2c, and nothing breaks where
 * there is none. */
#ifndef B2_OPS_CUDA_CUBLAS_H
#define B2_OPS_CUDA_CUBLAS_H

#include "ops/cuda/cuda.h"

enum { B2_CUBLAS_SPACE = 32 << 20 }; /* the most that an algorithm may take to work in */

/* out [rows, n] = x [rows, k] . w [n, k]^T in fp32; all device memory. */
struct b2_cublas_product {
    float *out;
    int64_t out_ld;
    const void *x; /* of dtype, as w: F32, F16 or BF16 */
    int64_t x_ld;
    const void *w;
    int64_t w_ld;
    b2_dtype dtype;
    int rows, n, k;
};

/* 0; 1 where there is no library or it knows no way for this product (use own kernels); -1 on failure. The library is looked
 * for once for each queue, and the way it chooses for a shape is kept. Takes what it works in from ctx->activations and gives
 * it back. */
int b2_cublas_multiply(b2_ctx *ctx, const b2_cublas_product *product, b2_err *err);

/* Which library large products go through, or why own kernels compute them; valid as long as the queue. */
const char *b2_cublas_library(b2_cuda *cuda, b2_err *err);
/* The same before there is a queue; what is wrong with a library that BLIP2C_CUBLASLT names stands in the text. */
void b2_cublas_describe(char *text, size_t bytes);

#endif
