/* Products with quantised weights: what linear.c hands over. */
#ifndef B2_OPS_CPU_LINEAR_QUADS_H
#define B2_OPS_CPU_LINEAR_QUADS_H

#include "ops/cpu/common.h"

/* out = epilogue(x . w^T) with activations of 16 bits, B2_QUAD_FEW_ROWS rows at a time: the weights are read anew for as
 * many more. Scratch is taken from the context and given back. */
int b2_cpu_quads_few(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue,
                     b2_err *err);

size_t b2_cpu_quads_few_scratch(int64_t max_rows, int64_t max_width);

/* The same with activations of 8 bits. */
int b2_cpu_quads_many(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_epilogue *epilogue,
                      b2_err *err);
size_t b2_cpu_quads_many_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width);

#endif
