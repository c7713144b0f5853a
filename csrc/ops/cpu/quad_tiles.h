/* Many rows times weights rounded to int8 or int4 (B2_QUADS): serial kernels of one instruction set, driven by
 * linear_quad_tiles.c.
 *
 * A row of x times the column scales is rounded to int8 in groups of input channels, each with one scale t:
 *     x[j] * column_scales[j] = t[g] * a[j] (nearly), |a| <= 127.
 * A group has 64 channels where weights are int8, 32 where they are int4, as they have a scale for every 32. Products inside
 * a group are exact sums in int32; over the groups runs one chain of fused multiply-adds in fp32, in ascending order from 0:
 *     int8:  c = scale * sum_g t[g] * float(sum_j a[j] q[j])
 *     int4:  c =         sum_g t[g] * (scale[g] * float(sum_j a[j] q[j]))
 * All instruction sets compute this, so their bits are the same, whatever the number of rows, the tile or the thread. */
#ifndef B2_OPS_CPU_QUAD_TILES_H
#define B2_OPS_CPU_QUAD_TILES_H

#include <stdint.h>

#include "core/tensor.h"

enum {
    B2_QUAD_UNIT = 32,          /* input channels that weights are padded to; groups are one or two units */
    B2_QUAD_GROUP_MAX = 64,
    B2_QUAD_TILE_COLUMNS = 2 * B2_PANEL
};

/* Bytes of a unit of a panel as stored. */
static inline int64_t b2_quad_unit_bytes(b2_dtype dtype)
{
    return B2_QUAD_UNIT * B2_PANEL / (dtype == B2_I4 ? 2 : 1);
}

static inline int b2_quad_group(b2_dtype dtype)
{
    return dtype == B2_I8 ? 64 : 32;
}

/* A block of rows of x, rounded; zeros where k ends. */
typedef struct b2_quad_block {
    char *values;     /* [units][32 / u][rows][u]: int8 and u = 4; or int16 and u = 2, of every four channels first the even
                       * ones, then the odd ones */
    float *scales;    /* [groups][rows] = t */
    int32_t *offsets; /* [groups][rows] = -zero * sum of the group's values: what a product with stored weights has too much */
} b2_quad_block;

/* Two panels of weights as the tile reads them, from some unit on. */
typedef struct b2_quad_operand {
    const char *values[2]; /* [units][32 / u][16][u]: bytes of q + zero, or int16 of q */
    const void *scales[2]; /* int4: float16 bits [units][16] */
} b2_quad_operand;

typedef struct b2_quad_tiles {
    int tile_rows;   /* most rows of a tile */
    int tile_panels; /* 1 or 2 */
    int value_bytes; /* of x and of operands: 1 or 2 */
    /* dst = rows of x [rows, k] (distance ld) times column_scales [k] (NULL: ones), rounded for weights of `dtype`. */
    void (*round_rows)(const b2_quad_block *dst, const float *x, int64_t ld, int rows, int64_t k,
                       const float *column_scales, b2_dtype dtype);
    /* dst = `units` units of a panel as stored; NULL in int8's place: it is read as it lies. */
    void (*unpack_i8)(char *dst, const uint8_t *panel, int64_t units);
    void (*unpack_i4)(char *dst, const uint8_t *panel, int64_t units);
    /* c [rows][32] (+)= the sums over `units` units from the beginning of a group, without int8's scale: starts from zero
     * if `first`, else goes on from c. Meanwhile it asks for half of so many units as stored from `next` (NULL: nothing): a
     * little with every group, since many lines at once would fill the queue to memory and stop the products. */
    void (*tile)(float *c, const b2_quad_block *x, const b2_quad_operand *w, b2_dtype dtype, int rows, int64_t units,
                 int first, const char *next);
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
