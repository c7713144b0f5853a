/* The Q-Former (BLIP-2 paper, section 3.1; transformers' Blip2QFormerModel): a BERT whose learned queries read the
 * picture through cross-attention in every cross_attention_frequency-th layer.
 *
 *     x = LN(queries)
 *     x = LN(x + dense(self_attention(x)))
 *     x = LN(x + dense(cross_attention(x, image)))        in layers 0, f, 2f, ...
 *     x = LN(x + output_query(gelu(intermediate_query(x)))) */
#ifndef B2_MODEL_QFORMER_H
#define B2_MODEL_QFORMER_H

#include "model/weight_table.h"
#include "ops/ops.h"

typedef struct b2_qformer_config {
    int64_t num_query_tokens;    /* Q */
    int64_t hidden_size;         /* D */
    int64_t intermediate_size;   /* F */
    int64_t encoder_hidden_size; /* E: width of the image embeddings */
    int num_hidden_layers;
    int num_attention_heads;
    int cross_attention_frequency;
    float layer_norm_eps;
    b2_act act;
} b2_qformer_config;

typedef struct b2_qformer_attention {
    b2_weight query_weight, query_bias;   /* [D, D], [D] */
    b2_weight key_weight, key_bias;       /* [D, D or E], [D] */
    b2_weight value_weight, value_bias;   /* [D, D or E], [D] */
    b2_weight dense_weight, dense_bias;   /* [D, D], [D] */
    b2_weight norm_weight, norm_bias;     /* [D] */
} b2_qformer_attention;

typedef struct b2_qformer_layer {
    b2_qformer_attention self_attention;
    b2_qformer_attention cross_attention; /* absent in layers without it */
    b2_weight intermediate_weight, intermediate_bias; /* [F, D], [F] */
    b2_weight output_weight, output_bias;             /* [D, F], [D] */
    b2_weight norm_weight, norm_bias;                 /* [D] */
} b2_qformer_layer;

typedef struct b2_qformer {
    b2_qformer_config config;
    b2_weight query_tokens;            /* [Q, D] */
    b2_weight norm_weight, norm_bias;  /* [D] */
    b2_qformer_layer *layers;          /* [num_hidden_layers], owned */
} b2_qformer;

int b2_qformer_bind(b2_qformer *qformer, const b2_qformer_config *config, b2_binder *binder, b2_err *err);
int b2_qformer_visit(const b2_qformer *qformer, b2_weight_visitor *visitor, b2_err *err);
void b2_qformer_release(b2_qformer *qformer);

/* Arena bytes for `pictures` at once, each with `image_tokens` (T) embeddings. */
size_t b2_qformer_scratch(const b2_ctx *ctx, const b2_qformer *qformer, int64_t pictures, int64_t image_tokens);

/* out [B*Q, D] = last hidden state of the queries; image [B*T, E]. Taps: "qformer". */
int b2_qformer_forward(b2_ctx *ctx, const b2_qformer *qformer, b2_tensor out, b2_tensor image, int64_t pictures,
                       b2_err *err);

#endif
