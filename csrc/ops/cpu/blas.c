#include "ops/cpu/blas.h"

/* scipy-openblas32 prefixes its symbols. Declared here because its cblas.h pulls in more than is used. */
extern void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                              int lda, const float *b, int ldb, float beta, float *c, int ldc);
extern void scipy_openblas_set_num_threads(int threads);

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

void b2_blas_use_one_thread(void)
{
    scipy_openblas_set_num_threads(1);
}

void b2_blas_sgemm_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
                      float *c, int64_t ldc)
{
    scipy_cblas_sgemm(ROW_MAJOR, NO_TRANS, TRANS, (int)m, (int)n, (int)k, 1.0f, a, (int)lda, b, (int)ldb, 0.0f, c,
                      (int)ldc);
}
