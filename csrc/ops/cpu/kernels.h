/* What an instruction set provides: serial kernels without knowledge of threads, memory or errors. One source
 * (*.inc.h) is compiled for each set through kernels_<isa>.c; linear.c, attention.c and rows.c drive them. */
#ifndef B2_OPS_CPU_KERNELS_H
#define B2_OPS_CPU_KERNELS_H

#include "ops/ops.h"

enum { B2_TILE_COLUMNS_MAX = 32, B2_TILE_ROWS_MAX = 16 };

/* What happens to a finished product: out = act(c * scales + bias) + residual. */
typedef struct b2_epilogue {
    const float *scales;   /* [cols] or NULL */
    const float *bias;     /* [cols] or NULL */
    const float *residual; /* [rows, cols], distance residual_ld; NULL: none; may be the output itself */
    int64_t residual_ld;
    b2_act act;
} b2_epilogue;

/* The panels of a register tile as fp32: at[i] [kc][16]. */
typedef struct b2_panels {
    float *at[2];
} b2_panels;

/* The same as stored, [kc][16] of `dtype`, and where the next ones will be read, to ask for them early. */
typedef struct b2_stored {
    const char *at[2];
    b2_dtype dtype;
    const char *next;   /* first of the next panels; the second lies next_distance bytes behind */
    size_t next_distance;
} b2_stored;

typedef struct b2_cpu_kernels {
    int tile_rows;    /* most rows of a register tile */
    int tile_panels;  /* panels of a register tile, 1 or 2 */

    /* dst [k][rows] = x [rows, k] (distance ld), rows <= tile_rows: the left operand of a tile. */
    void (*pack_rows)(float *dst, const float *x, int64_t ld, int rows, int64_t k);
    /* dst [kc][16] = columns [k0, k0 + kc) of `rows` <= 16 rows of w [*, k] (row-major, any alignment), zero-padded. */
    void (*widen_rows)(float *dst, const void *w, b2_dtype dtype, int64_t k, int64_t rows, int64_t k0, int64_t kc);
    /* dst [kc][16] = kc steps of a panel of B2_PAIRS, which begins at an even one. */
    void (*widen_pairs)(float *dst, const char *w, int64_t kc);
    /* c [rows][tile_panels*16] (+)= a [kc][rows] . b0, b1 [kc][16]: starts from zero if `first`, else goes on from c.
     * b1 is read only where tile_panels is 2. */
    void (*tile)(float *c, const float *a, const float *b0, const float *b1, int rows, int64_t kc, int first);
    /* c [rows, tile_panels*16] (distance c_ld) = a [rows, kc] (distance ld) . b0, b1: of rows that are read too few times
     * for packing them to pay. */
    void (*row_tile)(float *c, int64_t c_ld, const float *a, int64_t ld, const float *b0, const float *b1, int rows,
                     int64_t kc);
    /* As tile, from panels as stored, which it widens into b->at (fp32: it points b->at at them). */
    void (*tile_from)(float *c, const float *a, const b2_stored *stored, b2_panels *b, int rows, int64_t kc, int first);
    /* c [rows][panels*16] = a [k][rows] . panels of `w` (B2_PANELS or B2_PAIRS) from `at` on, rows <= tile_rows, panels = 1,
     * 2 or 4 and at most stream_panels(rows): reads each weight once, straight from memory. */
    void (*stream)(float *c, const float *a, const b2_weight *w, const char *at, int rows, int panels);
    int (*stream_panels)(int rows);
    /* out [rows, cols] (distance out_ld) from c [rows, >= cols] (distance c_ld); out may be c. */
    void (*finish)(float *out, int64_t out_ld, const float *c, int64_t c_ld, int64_t rows, int64_t cols,
                   const b2_epilogue *epilogue);

    /* out = (x - mean) / sqrt(var + eps) * gamma + beta, all [n]; gamma, beta may be NULL; out may be x. */
    void (*norm_row)(float *out, const float *x, const float *gamma, const float *beta, int64_t n, float eps);
    /* out = x / sqrt(mean(x^2) + eps) * gamma, all [n]; gamma may be NULL; out may be x. */
    void (*rms_norm_row)(float *out, const float *x, const float *gamma, int64_t n, float eps);
    /* out = act(gate) * up, all [n]; out may be either. */
    void (*gate_row)(float *out, const float *gate, const float *up, int64_t n, b2_act act);
    /* s [n] becomes exp(scale * s - max); returns the sum; writes zeros up to a multiple of 16. */
    float (*softmax_row)(float *s, int64_t n, float scale);
    void (*log_softmax_row)(float *x, int64_t n);
    /* The k first of x [n] by (value descending, id ascending), NaN last. */
    void (*top_k_row)(float *values, int32_t *ids, const float *x, int64_t n, int k);
    int (*row_is_finite)(const float *x, int64_t n);
    /* out [n] += x [n] */
    void (*add_row)(float *out, const float *x, int64_t n);
    /* dst [width][16] = up to 16 rows transposed, zero-padded. */
    void (*pack_keys)(float *dst, const float *const *rows, int64_t count, int64_t offset, int width);
    /* dst [ceil(width/16)][panel_rows][16], rows [0, count) written: columns [offset, offset + width), zero-padded. */
    void (*pack_values)(float *dst, const float *const *rows, int64_t count, int64_t panel_rows, int64_t offset,
                        int width);
    /* a, b [n] become a * cos - b * sin, b * cos + a * sin */
    void (*rotate_row)(float *a, float *b, const float *cos, const float *sin, int64_t n);
    /* out [n] = c [n] / sum */
    void (*divide_row)(float *out, const float *c, int64_t n, float sum);
    /* Millions of fused multiply-adds in registers: what the processor can do at most. Returns flops. */
    double (*fma_peak)(int64_t rounds, float *sink);
} b2_cpu_kernels;

/* Dot products of bfloat16 pairs (AVX512_BF16): both factors are bfloat16, sums fp32 with subnormals flushed to zero. An
 * element is one chain over ascending pairs of k. Tiles as in b2_cpu_kernels of the same backend. */
typedef struct b2_pair_kernels {
    /* dst [ceil(k/2)][rows][2] = x [rows, k] (distance ld) rounded to nearest even, zero-padded. */
    void (*pack_rows)(uint16_t *dst, const float *x, int64_t ld, int rows, int64_t k);
    /* c [rows][32] (+)= a [steps][rows][2] . b0, b1 [steps][16][2]; asks for next and next + next_distance unless NULL. */
    void (*tile)(float *c, const uint16_t *a, const char *b0, const char *b1, int rows, int64_t steps, int first,
                 const char *next, size_t next_distance);
    /* As fma_peak, of these products; returns operations, two for each product. */
    double (*peak)(int64_t rounds, float *sink);
} b2_pair_kernels;

extern const b2_cpu_kernels b2_cpu_kernels_generic;
#if defined(__x86_64__)
extern const b2_cpu_kernels b2_cpu_kernels_avx2;
extern const b2_cpu_kernels b2_cpu_kernels_avx512;
extern const b2_pair_kernels b2_pair_kernels_bf16;
#endif

#endif
