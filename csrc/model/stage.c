#include "model/stage.h"

#include <math.h>

int b2_stage_take(b2_ctx *ctx, b2_tensor *out, int64_t rows, int64_t cols, b2_err *err)
{
    float *data = b2_arena_take(ctx->activations, (size_t)(rows * cols), sizeof *data, err);
    *out = b2_tensor_of(data, rows, cols);
    return data ? 0 : -1;
}

size_t b2_stage_attention_scratch(int64_t items)
{
    return 3 * b2_arena_cost((size_t)(items + 1), sizeof(int32_t));
}

int b2_stage_equal_rows(b2_ctx *ctx, b2_stage_rows *rows, int64_t items, int64_t queries, int64_t keys, b2_err *err)
{
    rows->count = items;
    rows->q_offsets = b2_arena_take(ctx->scratch, (size_t)(items + 1), sizeof(int32_t), err);
    rows->k_starts = b2_arena_take(ctx->scratch, (size_t)(items + 1), sizeof(int32_t), err);
    rows->k_lens = b2_arena_take(ctx->scratch, (size_t)(items + 1), sizeof(int32_t), err);
    if (!rows->q_offsets || !rows->k_starts || !rows->k_lens)
        return -1;
    for (int64_t b = 0; b <= items; b++) {
        rows->q_offsets[b] = (int32_t)(b * queries);
        rows->k_starts[b] = (int32_t)(b * keys);
        rows->k_lens[b] = (int32_t)keys;
    }
    return 0;
}

b2_attention_args b2_stage_attention(const b2_stage_rows *rows, b2_tensor out, b2_tensor q, b2_tensor k, b2_tensor v,
                                     int heads)
{
    int head_dim = (int)(q.cols / heads);
    return (b2_attention_args){.out = out,
                               .q = q,
                               .rows = rows->count,
                               .q_offsets = rows->q_offsets,
                               .k = k,
                               .v = v,
                               .prefix_starts = rows->k_starts,
                               .prefix_lens = rows->k_lens,
                               .heads = heads,
                               .kv_heads = heads,
                               .head_dim = head_dim,
                               .scale = 1.0f / sqrtf((float)head_dim)};
}

int b2_stage_attend(b2_ctx *ctx, const char *stage, int layer, const b2_attention_args *args, b2_err *err)
{
    if (b2_attention(ctx, args, err) < 0)
        return -1;
    return ctx->tap && ctx->tap->attention ? ctx->tap->attention(ctx->tap, ctx, stage, layer, args, err) : 0;
}

int b2_stage_tap(b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err)
{
    return ctx->tap ? ctx->tap->fn(ctx->tap, ctx, stage, layer, hidden, err) : 0;
}

int b2_stage_done(b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err)
{
    if (b2_note_finite(ctx, stage, layer, hidden, err) < 0)
        return -1;
    return b2_stage_tap(ctx, stage, layer, hidden, err);
}
