/* Rounding of weights to int8 and int4 (B2_QUADS). Used by b2_weight_pack. */
#ifndef B2_OPS_QUANTISE_H
#define B2_OPS_QUANTISE_H

#include "core/error.h"
#include "core/pool.h"
#include "core/tensor.h"

/* Fills `block` (the parts of dst lie in it, in place already: dtype I8 or I4, n, k, group) from src [n, k] in B2_ROWS.
 * B2_E_NUMERIC naming the tensor where a value is not finite. */
int b2_quantise(char *block, const b2_weight *dst, const b2_weight *src, b2_pool *pool, b2_cancel *cancel, b2_err *err);

#endif
