/* The kernels of quads.h, compiled once for each instruction set. What differs between the sets is how four X lie in
 * 8 bytes and how a block is multiplied; see the file of each. */
#include "ops/cpu/quads.h"

#include <math.h>

#include "ops/cpu/simd.h"

enum { QUADS_PER_BLOCK = B2_QUAD_BLOCK / 4, X_BYTES = 8 /* of four X */ };

B2_INLINE int64_t block_bytes(b2_dtype dtype)
{
    return dtype == B2_I8 ? B2_QUAD_BLOCK * B2_PANEL : B2_QUAD_BLOCK * B2_PANEL / 2;
}

/* Whole numbers of one block, as X. */
static void round_block(int32_t out[B2_QUAD_BLOCK], const float *x, const float *column_scales, int64_t count,
                        float inverse)
{
    float y[B2_QUAD_BLOCK] = {0};
    for (int64_t i = 0; i < count; i++)
        y[i] = column_scales ? x[i] * column_scales[i] : x[i];
    for (int i = 0; i < B2_QUAD_BLOCK; i += VW)
        v_store(y + i, v_round(v_mul(v_load(y + i), v_set1(inverse))));
    for (int i = 0; i < B2_QUAD_BLOCK; i++)
        out[i] = (int32_t)y[i];
}

/* The largest |x * column scale|; Inf where one of them is not finite. */
static float largest(const float *x, const float *column_scales, int64_t k)
{
    vf most = v_set1(0.0f), nans = v_set1(0.0f);
    int64_t i = 0;
    for (; i + VW <= k; i += VW) {
        vf y = column_scales ? v_mul(v_load(x + i), v_load(column_scales + i)) : v_load(x + i);
        most = v_max(v_abs(y), most);
        nans = v_fma(y, v_set1(0.0f), nans); /* NaN from NaN and Inf */
    }
    float lane[VW], nan_lane[VW], result = 0.0f, nan = 0.0f;
    v_store(lane, most);
    v_store(nan_lane, nans);
    for (int v = 0; v < VW; v++) {
        result = lane[v] > result ? lane[v] : result;
        nan += nan_lane[v];
    }
    for (; i < k; i++) {
        float y = column_scales ? x[i] * column_scales[i] : x[i];
        result = fabsf(y) > result ? fabsf(y) : result;
        nan += y * 0.0f;
    }
    return nan == nan ? result : INFINITY;
}

/* Below this, a row is zero: its inverse would not be finite. */
static const float NOTHING = 1e-30f;

/* scale, and the factor that makes whole numbers of x. */
static float row_scale(float *scale, const float *x, const float *column_scales, int64_t k)
{
    float most = largest(x, column_scales, k);
    if (most < NOTHING || most == INFINITY) {
        *scale = most == INFINITY ? NAN : 0.0f;
        return 0.0f;
    }
    *scale = most / (float)B2_QUAD_ACTIVATION;
    return (float)B2_QUAD_ACTIVATION / most;
}

#if defined(B2_SIMD_AVX512)
#include "ops/cpu/quads_vnni.inc.h"
#elif defined(B2_SIMD_AVX2)
#include "ops/cpu/quads_avx2.inc.h"
#else
#include "ops/cpu/quads_generic.inc.h"
#endif

static void quantise_row(void *values, int32_t *sums, float *scale, const float *x, const float *column_scales,
                         int64_t k, int row, int rows)
{
    float inverse = row_scale(scale, x, column_scales, k);
    char *to = (char *)values + (size_t)row * X_BYTES;
    for (int64_t i = 0; i < k; i += B2_QUAD_BLOCK) {
        int64_t count = k - i < B2_QUAD_BLOCK ? k - i : B2_QUAD_BLOCK;
        int64_t block = i / B2_QUAD_BLOCK;
        char *at = to + (size_t)(block * QUADS_PER_BLOCK * rows) * X_BYTES;
        int32_t whole[B2_QUAD_BLOCK];
        if (inverse == 0.0f) /* 0 times a NaN is none: nothing of such a row may get through as a number */
            memset(whole, 0, sizeof whole);
        else
            round_block(whole, x + i, column_scales ? column_scales + i : NULL, count, inverse);
        int32_t sum = 0;
        for (int j = 0; j < B2_QUAD_BLOCK; j++)
            sum += whole[j];
        sums[block * rows + row] = sum;
        store_block(at, whole, (size_t)rows * X_BYTES);
    }
}

const b2_quad_kernels B2_QUAD_KERNELS = {
    .quantise_row = quantise_row,
    .stream = stream,
    .stream_panels = stream_panels,
};
