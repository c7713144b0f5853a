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

int b2_lm_store(b2_ctx *ctx, const b2_lm_batch *batch, int layer, b2_tensor k, b2_tensor v, b2_err *err)
{
    b2_tensor keys = b2_kv_cache_keys(batch->cache, layer), values = b2_kv_cache_values(batch->cache, layer);
    b2_dtype dtype = batch->cache->dtype;
    return b2_store_rows(ctx, keys, dtype, batch->cache_rows, k, err) < 0 ||
                   b2_store_rows(ctx, values, dtype, batch->cache_rows, v, err) < 0
               ? -1
               : 0;
}

b2_attention_args b2_lm_attention(const b2_lm_batch *batch, int layer, b2_tensor out, b2_tensor q)
{
    b2_tensor keys = b2_kv_cache_keys(batch->cache, layer), values = b2_kv_cache_values(batch->cache, layer);
    return (b2_attention_args){
        .out = out,
        .q = q,
        .rows = batch->rows,
        .q_offsets = batch->q_offsets,
        .k = keys,
        .v = values,
        .prefix_starts = batch->prefix_starts,
        .prefix_lens = batch->prefix_lens,
        .keys = batch->cache->dtype,
        .k_suffix = keys,
        .v_suffix = values,
        .suffix_slots = batch->suffix_slots,
        .suffix_ld = batch->suffix_ld,
        .suffix_lens = batch->suffix_lens,
        .key_mask = batch->key_mask,
        .key_mask_ld = batch->key_mask_ld,
        .causal = 1,
    };
}
