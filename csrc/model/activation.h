/* transformers' names of activation functions. */
#ifndef B2_MODEL_ACTIVATION_H
#define B2_MODEL_ACTIVATION_H

#include "ops/ops.h"

/* "gelu" (erf), "relu", "gelu_new" / "gelu_pytorch_tanh" (tanh form), "quick_gelu", "silu" / "swish".
 * B2_E_UNSUPPORTED naming `where` for another. */
int b2_activation(b2_act *act, const char *name, const char *where, b2_err *err);

#endif
