/* Many rows times weights rounded to int8 or int4 (B2_QUADS): serial kernels of one instruction set, driven by
 * linear_quad_tiles.c.
 *
 * A row of x times the column scales is rounded to int8 in groups of 32 input channels, each with one scale t:
 *     x[j] * column_scales[j] = t[g] * a[j] (nearly), |a| <= 127.
 * Products inside a group are exact sums in int32; over the groups runs one chain of fused multiply-adds in fp32, in
 * ascending order from 0:
 *     int8:  c = scale * sum_g t[g] * float(sum_j a[j] q[j])
 *     int4:  c =         sum_g t[g] * (scale[g] * float(sum_j a[j] q[j]))
 * All instruction sets compute this, so their bits are the same, whatever the number of rows, the tile or the thread. */
#ifndef B2_OPS_CPU_QUAD_TILES_H
#define B2_OPS_CPU_QUAD_TILES_H

#include <stdint.h>

#include "core/tensor.h"

enum {
    B2_QUAD_GROUP = 32,         /* input channels of one rounding of x */
    B2_QUAD_TILE_ROWS_MAX = 12,
    B2_QUAD_TILE_COLUMNS = 2 * B2_PANEL
};

/* A block of rows of x, rounded. Groups are counted in all of k, zeros where it ends. */
typedef struct b2_quad_block {
    char *values;     /* [groups][32 / u][rows][u]: int8 and u = 4, or int16 and u = 2 */
    float *scales;    /* [groups][rows] = t */
    int32_t *offsets; /* [groups][rows] = -zero * sum of the group's values, where weights are multiplied as stored, q + zero */
} b2_quad_block;

/* Two panels of weights as the tile reads them, from the present group on. */
typedef struct b2_quad_operand {
    const char *values[2]; /* [groups][32 / u][16][u]: bytes of q + zero, or int16 of q */
    const void *scales[2]; /* int4: float16 bits [groups][16] */
} b2_quad_operand;

typedef struct b2_quad_tiles {
    int tile_rows;   /* most rows of a tile; fewest: see driver */
    int tile_panels; /* 1 or 2 */
    int value_bytes; /* of x and of operands: 1 or 2 */
    /* dst = rows of x [rows, k] (distance ld) times column_scales [k] (NULL: ones), rounded. `zero`: 128 or 8. */
    void (*round_rows)(const b2_quad_block *dst, const float *x, int64_t ld, int rows, int64_t k,
                       const float *column_scales, int zero);
    /* dst = `groups` groups of a panel as stored; NULL in int8's place: it is read as it lies. */
    void (*unpack_i8)(char *dst, const uint8_t *panel, int64_t groups);
    void (*unpack_i4)(char *dst, const uint8_t *panel, int64_t groups);
    /* c [rows][32] += the sums over `groups` groups, without int8's scale of the output channel. */
    void (*tile)(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t groups);
    /* int8: c [rows][32] *= scales [2][16] */
    void (*scale)(float *c, const float *scales0, const float *scales1, int rows);
    /* As fma_peak (kernels.h), of int8 products; returns operations, two for each product. */
    double (*peak)(int64_t rounds, float *sink);
} b2_quad_tiles;

extern const b2_quad_tiles b2_quad_tiles_generic;
#if defined(__x86_64__)
extern const b2_quad_tiles b2_quad_tiles_avx2;
extern const b2_quad_tiles b2_quad_tiles_avx512;
extern const b2_quad_tiles b2_quad_tiles_vnni;
#endif

#endif
