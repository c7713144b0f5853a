/* What an instruction set provides for quantised weights (B2_QUADS). Serial kernels, as in kernels.h.
 *
 * Few rows: memory is the limit, so activations keep 16 bits. Row r of x times the column scales is X[r] * scale[r],
 * X whole numbers with |X| <= 32639 = 127 * 256 + 127, so that X = 256 * high + low with both in [-128, 127]. For a group
 * of input channels T = sum q * X is exact, t = float(T) rounds once, and
 *     c[r][i] = scale[r] * (t_0 * w_0 + t_1 * w_1 + ...)         w_g: the scales of channel i, a chain of fused multiply-adds.
 * Every instruction set gives the same bits. */
#ifndef B2_OPS_CPU_QUADS_H
#define B2_OPS_CPU_QUADS_H

#include "ops/ops.h"

enum {
    B2_QUAD_BLOCK = 32,       /* input channels that are stored and, at the least, share a scale */
    B2_QUAD_FEW_ROWS = 15,    /* most rows of a streaming kernel */
    B2_QUAD_NARROW = 512,     /* input channels of a group whose T fits into 32 bits: 127 * 32639 * 512 < 2^31 */
    B2_QUAD_ACTIVATION = 32639
};

/* The rows of x as whole numbers. */
typedef struct b2_quad_rows {
    const void *values;     /* [blocks * 8][rows] of 8 bytes: four X, arranged as the set's kernels read them */
    const float *scales;    /* [rows]; NaN where the row holds a NaN or Inf */
    const int32_t *narrow;  /* [groups][rows]: - zero * sum of X over the group, where group <= B2_QUAD_NARROW; else NULL */
    const double *wide;     /* the same where the group is larger; else NULL */
    int rows;
} b2_quad_rows;

/* Panels of a weight. */
typedef struct b2_quad_panels {
    const uint8_t *data;
    const void *scales;     /* [panels][groups][16], F32 for I8, F16 for I4 */
    b2_dtype dtype;
    int64_t blocks;         /* ceil(k / 32) */
    int64_t group_blocks;   /* blocks that share a scale; the last group may have fewer */
    int64_t groups;         /* ceil(blocks / group_blocks) */
} b2_quad_panels;

typedef struct b2_quad_kernels {
    /* Row `row` of `rows`: values as in b2_quad_rows, zeros behind k; sums [blocks][rows] of X over each block. */
    void (*quantise_row)(void *values, int32_t *sums, float *scale, const float *x, const float *column_scales,
                         int64_t k, int row, int rows);
    /* c [rows][panels * 16], panels = 1 or 2 and at most stream_panels(rows): reads each weight once. */
    void (*stream)(float *c, const b2_quad_rows *x, const b2_quad_panels *w, int panels);
    int (*stream_panels)(b2_dtype dtype, int rows);
} b2_quad_kernels;

extern const b2_quad_kernels b2_quad_kernels_generic;
#if defined(__x86_64__)
extern const b2_quad_kernels b2_quad_kernels_avx2;
extern const b2_quad_kernels b2_quad_kernels_vnni; /* AVX-512 with VNNI */
#endif

#endif
