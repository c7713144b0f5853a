/* The private copy of OpenBLAS: one thread, tiled from our own pool. */
#ifndef B2_OPS_CPU_BLAS_H
#define B2_OPS_CPU_BLAS_H

#include <stdint.h>

/* Process-wide for this copy; called once when the module loads. */
void b2_blas_use_one_thread(void);

/* c [m, n] (row distance ldc) = a [m, k] (lda) . b [n, k]^T (ldb). Serial. */
void b2_blas_sgemm_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                      int64_t ldc);

#endif
