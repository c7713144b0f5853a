#include "model/lm.h"

#include <string.h>

static const struct {
    const char *model_type;
    const b2_lm_class *class_;
} models[] = {
    {"opt", &b2_opt_class},
    {"t5", &b2_t5_class},
    {"llama", &b2_llama_class},
    {"mistral", &b2_llama_class},
    {"qwen2", &b2_llama_class},
    {"qwen3", &b2_llama_class},
};

const b2_lm_class *b2_lm_class_of(const char *model_type)
{
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        if (strcmp(models[i].model_type, model_type) == 0)
            return models[i].class_;
    return NULL;
}

int b2_lm_head(b2_ctx *ctx, const b2_lm_batch *batch, b2_tensor x, const b2_weight *weight, b2_err *err)
{
    b2_linear_opts opts = {0};
    b2_rows_are before = ctx->rows_are;
    if (batch->logit_rows)
        ctx->rows_are = B2_ROWS_APART;
    int status = b2_linear(ctx, batch->logits, x, weight, &opts, err);
    ctx->rows_are = before;
    return status;
}
