/* Packing: from the tensors of a checkpoint to the layout that a backend's kernels read. Owner of the result: the
 * caller, who frees it with b2_weight_release. */
#ifndef B2_OPS_WEIGHTS_H
#define B2_OPS_WEIGHTS_H

#include "core/error.h"
#include "core/memory.h"
#include "core/pool.h"
#include "core/tensor.h"

/* How a matrix is to be held. */
typedef struct b2_format {
    b2_dtype dtype;
    b2_layout layout; /* B2_PANELS for F32, F16, BF16; B2_PAIRS for BF16; B2_QUADS for I8, I4 */
} b2_format;

/* dst = src [n, k] (B2_ROWS, any alignment, F32, F16 or BF16) in `format`; rounding to nearest even where the dtype
 * narrows; a value that overflows float16 gives B2_E_NUMERIC naming the tensor, as does a value that is not finite where
 * the format is quantised. dst->data is allocated (owned = 1). */
int b2_weight_pack(b2_weight *dst, const b2_weight *src, b2_format format, b2_pool *pool, b2_cancel *cancel,
                   b2_err *err);

/* out [k] = row i of w as fp32, whatever dtype and layout: an embedding. */
void b2_weight_read_row(float *out, const b2_weight *w, int64_t i);
/* out [count] = columns [first, first + count) of it. */
void b2_weight_read_part(float *out, const b2_weight *w, int64_t i, int64_t first, int64_t count);

/* Where the parts of a packed weight lie in its one block, each at a multiple of 64 bytes (256 in B2_STRIDED): data, then
 * scales, then column scales. A file of packed weights holds such blocks as they are. */
typedef struct b2_weight_parts {
    size_t scales;        /* offset; 0: none */
    size_t column_scales; /* offset; 0: none */
    size_t bytes;         /* of the whole block, a multiple of 64 */
} b2_weight_parts;

/* Of a weight of n x k in this format (b2_weight: dtype, layout, group, n, k are read). */
b2_weight_parts b2_weight_parts_of(const b2_weight *w);
/* Points data, scales and column_scales of `w` into `block`; `has_column_scales` says whether that part is in use. */
void b2_weight_place(b2_weight *w, const void *block, int has_column_scales);

/* dst = src as owned B2_ROWS in `dtype`. Vectors (norms, biases) are held so, in F32. */
int b2_weight_copy(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_err *err);

/* dst = src, a matrix on the host, as B2_STRIDED in `memory` (NULL: on the heap): in `dtype`; src in B2_QUADS stays as it is.
 * Errors as of b2_weight_pack. */
int b2_weight_stride(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_memory *memory, b2_pool *pool,
                     b2_cancel *cancel, b2_err *err);
/* Rows on the host (a vector, a table) go to `memory`; what they were in is released. */
int b2_weight_move(b2_weight *w, b2_memory *memory, b2_err *err);
/* copy = a weight in the memory of a device, on the heap; to be released. */
int b2_weight_fetch(b2_weight *copy, const b2_weight *w, b2_err *err);

/* out [n, k] row-major in w->dtype (F32 where w is quantised), whatever w's layout: for saving. */
int b2_weight_unpack(void *out, const b2_weight *w, b2_err *err);

void b2_weight_release(b2_weight *w);

/* Elementwise conversion between dtypes, round to nearest even; src and dst may be unaligned. Returns the number of finite values that
 * became infinite. */
int64_t b2_convert(void *dst, b2_dtype dst_dtype, const void *src, b2_dtype src_dtype, int64_t count);

#endif
