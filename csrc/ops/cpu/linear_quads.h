/* Products with quantised weights: what linear.c hands over. */
#ifndef B2_OPS_CPU_LINEAR_QUADS_H
#define B2_OPS_CPU_LINEAR_QUADS_H

#include "ops/cpu/common.h"

/* out = epilogue(x . w^T) for at most B2_QUAD_FEW_ROWS rows. Scratch is taken from the context and given back. */
int b2_cpu_quads_few(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue,
                     b2_err *err);

size_t b2_cpu_quads_few_scratch(int64_t max_rows, int64_t max_width);

/* The same for more rows. */
int b2_cpu_quads_many(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue,
                      b2_err *err);
size_t b2_cpu_quads_many_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width);

#endif
