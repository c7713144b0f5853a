/* Views and weights. Read by C and C++.
 *
 * `b2_tensor` is a view: it never owns. Activations are packed [N, D]: N is all live tokens of all rows, never
 * padded to [B, T, D]; `ld` is the distance between two rows, so that a slice of columns is a view too.
 * `b2_weight` is a weight: where it lives, in which format and layout, and a version that changes whenever its
 * values do (packed forms, graphs and cached products remember the version they were made from). */
#ifndef B2_CORE_TENSOR_H
#define B2_CORE_TENSOR_H

#include <stddef.h>
#include <stdint.h>

typedef enum b2_dtype { B2_F32 = 0, B2_F16, B2_BF16, B2_I8, B2_I4, B2_DTYPE_COUNT } b2_dtype;

/* Bytes of one element; of the types that have whole bytes (B2_I4 has half of one and stands only in B2_QUADS and
 * B2_STRIDED). */
static inline size_t b2_dtype_size(b2_dtype dtype)
{
    return dtype == B2_F32 ? 4 : dtype == B2_I8 ? 1 : 2;
}

static inline const char *b2_dtype_name(b2_dtype dtype)
{
    static const char *const names[B2_DTYPE_COUNT] = {"F32", "F16", "BF16", "I8", "I4"};
    return names[dtype];
}

/* As users know them. */
static inline const char *b2_dtype_word(b2_dtype dtype)
{
    static const char *const words[B2_DTYPE_COUNT] = {"float32", "float16", "bfloat16", "int8", "int4"};
    return words[dtype];
}

static inline int b2_dtype_is_quantised(b2_dtype dtype)
{
    return dtype == B2_I8 || dtype == B2_I4;
}

/* A view of fp32 activations: element (i, j) is data[i * ld + j]. */
typedef struct b2_tensor {
    float *data;  /* [rows, cols], distance ld between rows */
    int64_t rows; /* N: packed tokens */
    int64_t cols; /* D: width */
    int64_t ld;   /* >= cols */
} b2_tensor;

static inline b2_tensor b2_tensor_of(float *data, int64_t rows, int64_t cols)
{
    b2_tensor t = {data, rows, cols, cols};
    return t;
}

static inline b2_tensor b2_rows(b2_tensor t, int64_t first, int64_t count)
{
    b2_tensor part = {t.data + first * t.ld, count, t.cols, t.ld};
    return part;
}

static inline b2_tensor b2_cols(b2_tensor t, int64_t first, int64_t count)
{
    b2_tensor part = {t.data + first, t.rows, count, t.ld};
    return part;
}

typedef enum b2_layout {
    B2_ROWS,   /* [n, k] row-major, as the file stores it */
    B2_PANELS, /* [ceil(n/16)][k][16]: 16 output channels side by side for each k; the last panel zero-padded */
    B2_PAIRS,  /* BF16 only, [ceil(n/16)][ceil(k/2)][16][2]: what dot products of bfloat16 pairs read. A weight held so
                * asks for bfloat16 arithmetic where many rows meet it; zero-padded */
    B2_QUADS,  /* I8: [ceil(n/16)][ceil(k/32)*8][16][4] bytes of q + 128.
                * I4: [ceil(n/16)][ceil(k/32)*4][16][4] bytes: of 8 input channels, the first 4 in the low halves, the
                * others in the high ones, q + 8.
                * Zero (that is, 128 and 8) where n or k end. The same on every instruction set. */
    B2_STRIDED /* What devices read: [n, ld] row-major, ld = b2_strided_ld(k), zero where k ends. F32, F16, BF16.
                * I8: bytes of q. I4: [n, ld/2] bytes, the even column in the low half, the odd one in the high half, q + 8
                * (8 where k ends). */
} b2_layout;

enum { B2_PANEL = 16 };

/* Elements between two rows of a weight in B2_STRIDED: rows begin at multiples of 16 bytes, and of 32 for all but I4. */
static inline int64_t b2_strided_ld(int64_t k)
{
    return (k + 31) / 32 * 32;
}

typedef struct b2_weight {
    const char *name; /* tensor name in the checkpoint; owned by the weight store */
    const void *data; /* n * k elements of `dtype` in `layout`; NULL: this weight is absent (an optional bias). Of packed
                       * weights the scales follow in the same block (b2_weight_parts in ops/weights.h) */
    int64_t n;        /* output channels (rows of the file's matrix), or the length of a vector */
    int64_t k;        /* input channels; 1 for a vector. Vectors are always F32, B2_ROWS */
    b2_dtype dtype;   /* how the elements are stored */
    b2_layout layout;
    /* Quantised weights: w[i][j] = column_scales[j] * scales[i][j / group] * q[i][j], |q| <= 127 or 7 (-8 allowed).
     * column_scales belong to the input: x[j] is multiplied by its one before it is rounded, so that channels whose
     * weights are small because their activations are large lose nothing. */
    const float *column_scales; /* [k]; NULL: ones */
    const void *scales;         /* [ceil(n/16)][ceil(k/group)][16], in B2_STRIDED [n][ceil(k/group)]: F32 for I8, F16 bits
                                 * for I4; NULL: not quantised */
    int64_t group;              /* input channels that share a scale: I8: k rounded up to 32; I4: 32 */
    int owned;        /* 1: `data` was allocated for this weight; 0: `data` points into a mapped file */
    struct b2_memory *memory; /* where `data` lies; NULL: the heap, or a mapped file */
    uint64_t version; /* changes with the values */
} b2_weight;

#endif
