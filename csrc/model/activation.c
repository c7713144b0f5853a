#include "model/activation.h"

#include <string.h>

static const struct {
    const char *name;
    b2_act act;
} activations[] = {
    {"gelu", B2_ACT_GELU_ERF},
    {"relu", B2_ACT_RELU},
    {"gelu_new", B2_ACT_GELU_TANH},
    {"gelu_pytorch_tanh", B2_ACT_GELU_TANH},
    {"quick_gelu", B2_ACT_QUICK_GELU},
    {"silu", B2_ACT_SILU},
    {"swish", B2_ACT_SILU},
};

int b2_activation(b2_act *act, const char *name, const char *where, b2_err *err)
{
    for (size_t i = 0; i < sizeof activations / sizeof *activations; i++)
        if (strcmp(name, activations[i].name) == 0) {
            *act = activations[i].act;
            return 0;
        }
    return b2_fail(err, B2_E_UNSUPPORTED, "%s: activation function %.64s is not supported", where, name);
}
