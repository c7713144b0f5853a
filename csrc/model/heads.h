/* What retrieval reads off the Q-Former (transformers' Blip2ForImageTextRetrieval): two projections into the space where
 * pictures and texts are compared (ITC), and a classifier of pairs (ITM).
 *
 *     pictures  unit(vision_projection(query))        for each query
 *     texts     unit(text_projection(token))          for each token; the first stands for the text
 *     match     mean over the queries of itm_head(query), the queries having read picture and text: logits of no, yes */
#ifndef B2_MODEL_HEADS_H
#define B2_MODEL_HEADS_H

#include "model/weight_table.h"
#include "ops/ops.h"

/* Which of them a model has. */
typedef struct b2_heads_config {
    int64_t hidden_size;     /* D: width of the Q-Former */
    int64_t projection_size; /* P */
    int vision, text, match;
} b2_heads_config;

typedef struct b2_heads {
    b2_heads_config config;
    b2_weight vision_weight, vision_bias; /* [P, D], [P] */
    b2_weight text_weight, text_bias;     /* [P, D], [P] */
    b2_weight match_weight, match_bias;   /* [2, D], [2] */
} b2_heads;

int b2_heads_bind(b2_heads *heads, const b2_heads_config *config, b2_binder *binder, b2_err *err);
int b2_heads_visit(const b2_heads *heads, b2_weight_visitor *visitor, b2_err *err);
void b2_heads_release(b2_heads *heads);

/* Arena bytes that any of the following takes for x of `rows`. */
size_t b2_heads_scratch(const b2_ctx *ctx, const b2_heads *heads, int64_t rows);

/* out [N, P] of x [N, D]. B2_E_UNSUPPORTED where the model lacks the head. */
int b2_heads_project_vision(b2_ctx *ctx, const b2_heads *heads, b2_tensor out, b2_tensor x, b2_err *err);
int b2_heads_project_text(b2_ctx *ctx, const b2_heads *heads, b2_tensor out, b2_tensor x, b2_err *err);
/* out [B, 2] of x [B*Q, D]. */
int b2_heads_match(b2_ctx *ctx, const b2_heads *heads, b2_tensor out, b2_tensor x, b2_err *err);

#endif
