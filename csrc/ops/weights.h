/* Packing: from the tensors of a checkpoint to the layout that a backend's kernels read. Owner of the result: the
 * caller, who frees it with b2_weight_release. */
#ifndef B2_OPS_WEIGHTS_H
#define B2_OPS_WEIGHTS_H

#include "core/error.h"
#include "core/pool.h"
#include "core/tensor.h"

/* dst = src [n, k] (B2_ROWS, any alignment, any dtype) in `dtype` and B2_PANELS layout; rounding to nearest even where the dtype
 * narrows; a value that overflows float16 gives B2_E_NUMERIC naming the tensor. dst->data is allocated (owned = 1). */
int b2_weight_pack(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_pool *pool, b2_cancel *cancel,
                   b2_err *err);

/* dst = src as owned B2_ROWS in `dtype`. Vectors (norms, biases) are held so, in F32. */
int b2_weight_copy(b2_weight *dst, const b2_weight *src, b2_dtype dtype, b2_err *err);

/* out [n, k] row-major in w->dtype, whatever w's layout: for saving. */
int b2_weight_unpack(void *out, const b2_weight *w, b2_err *err);

void b2_weight_release(b2_weight *w);

/* Elementwise conversion between dtypes, round to nearest even; src and dst may be unaligned. Returns the number of finite values that
 * became infinite. */
int64_t b2_convert(void *dst, b2_dtype dst_dtype, const void *src, b2_dtype src_dtype, int64_t count);

#endif
