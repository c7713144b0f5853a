/* The loss of language modelling, token by token: -log softmax(logits)[target]. */
#ifndef B2_TRAIN_CROSS_ENTROPY_H
#define B2_TRAIN_CROSS_ENTROPY_H

#include "ops/ops.h"

/* losses [N] of logits [N, V] and targets [N]; 0 where the target is ignore_index, B2_E_INDEX where it is otherwise outside
 * 0..V-1. The logits are read where they lie: nothing of their size is made. Takes no scratch. */
int b2_cross_entropy(b2_ctx *ctx, float *losses, b2_tensor logits, const int64_t *targets, int64_t ignore_index,
                     b2_err *err);

#endif
