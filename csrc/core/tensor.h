/* Views and weights.
 *
 * `b2_tensor` is a view: it never owns. Activations are packed [N, D]: N is all live tokens of all rows, never
 * padded to [B, T, D]; `ld` is the distance between two rows, so that a slice of columns is a view too.
 * `b2_weight` is a weight: where it lives, in which format and layout, and a version that changes whenever its
 * values do (packed forms, graphs and cached products remember the version they were made from). */
#ifndef B2_CORE_TENSOR_H
#define B2_CORE_TENSOR_H

#include <stddef.h>
#include <stdint.h>

typedef enum b2_dtype { B2_F32 = 0, B2_F16, B2_BF16 } b2_dtype;

static inline size_t b2_dtype_size(b2_dtype dtype)
{
    return dtype == B2_F32 ? 4 : 2;
}

static inline const char *b2_dtype_name(b2_dtype dtype)
{
    return dtype == B2_F32 ? "F32" : dtype == B2_F16 ? "F16" : "BF16";
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
    return (b2_tensor){data, rows, cols, cols};
}

static inline b2_tensor b2_rows(b2_tensor t, int64_t first, int64_t count)
{
    return (b2_tensor){t.data + first * t.ld, count, t.cols, t.ld};
}

static inline b2_tensor b2_cols(b2_tensor t, int64_t first, int64_t count)
{
    return (b2_tensor){t.data + first, t.rows, count, t.ld};
}

typedef enum b2_layout {
    B2_ROWS,  /* [n, k] row-major, as the file stores it */
    B2_PANELS /* [ceil(n/16)][k][16]: 16 output channels side by side for each k; the last panel zero-padded */
} b2_layout;

enum { B2_PANEL = 16 };

typedef struct b2_weight {
    const char *name; /* tensor name in the checkpoint; owned by the weight store */
    const void *data; /* n * k elements of `dtype` in `layout`; NULL: this weight is absent (an optional bias) */
    int64_t n;        /* output channels (rows of the file's matrix), or the length of a vector */
    int64_t k;        /* input channels; 1 for a vector. Vectors are always F32, B2_ROWS */
    b2_dtype dtype;   /* how the elements are stored */
    b2_layout layout;
    int owned;        /* 1: `data` was allocated for this weight; 0: `data` points into a mapped file */
    uint64_t version; /* changes with the values */
} b2_weight;

#endif
