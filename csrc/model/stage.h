/* What the stages share: buffers, row tables for attention over items of equal length, and the check after a layer. */
#ifndef B2_MODEL_STAGE_H
#define B2_MODEL_STAGE_H

#include "core/integers.h"
#include "ops/ops.h"

/* out [rows, cols] from ctx->activations. */
int b2_stage_take(b2_ctx *ctx, b2_tensor *out, int64_t rows, int64_t cols, b2_err *err);

/* B items: item b's queries are rows [b*queries, (b+1)*queries), its keys rows [b*keys, (b+1)*keys). */
typedef struct b2_stage_rows {
    int64_t count;
    int32_t *q_offsets; /* [B+1] */
    int32_t *k_starts;  /* [B] */
    int32_t *k_lens;    /* [B] */
} b2_stage_rows;

size_t b2_stage_attention_scratch(int64_t items);
int b2_stage_equal_rows(b2_ctx *ctx, b2_stage_rows *rows, int64_t items, int64_t queries, int64_t keys, b2_err *err);

/* Bidirectional attention of each item over its own keys, scale 1/sqrt(Dh). */
b2_attention_args b2_stage_attention(const b2_stage_rows *rows, b2_tensor out, b2_tensor q, b2_tensor k, b2_tensor v,
                                     int heads);

/* b2_attention, then the tap where it watches attention. Every attention of every stage goes through here. */
int b2_stage_attend(b2_ctx *ctx, const char *stage, int layer, const b2_attention_args *args, b2_err *err);

/* The tap alone, where one is set. */
int b2_stage_tap(b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err);

/* After a layer: a NaN or Inf is an error that names stage, layer and row; then the tap sees the hidden states. */
int b2_stage_done(b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err);

#endif
