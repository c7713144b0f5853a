/* The Q-Former (BLIP-2 paper, section 3.1; transformers' Blip2QFormerModel, InstructBlipQFormerModel): a BERT whose
 * learned queries read the picture through cross-attention in every cross_attention_frequency-th layer. Texts may go
 * through beside them (then queries and text see each other in self-attention) or alone.
 *
 *     x = LN(queries);  y = LN(word(ids) + position(0, 1, ...))
 *     x, y = LN(. + dense(self_attention(. over x and y)))
 *     x = LN(x + dense(cross_attention(x, image)))        in layers 0, f, 2f, ...
 *     x = LN(x + output_query(gelu(intermediate_query(x))));  y = LN(y + output(gelu(intermediate(y))))
 *
 * Texts are packed, of unequal length: each gives what it gives alone. */
#ifndef B2_MODEL_QFORMER_H
#define B2_MODEL_QFORMER_H

#include "model/weight_table.h"
#include "ops/ops.h"

typedef enum b2_text_side {
    B2_TEXT_NONE = 0, /* queries alone */
    B2_TEXT_BESIDE,   /* InstructBLIP: a text beside each picture, always */
    B2_TEXT_APART     /* retrieval: a text beside each picture, none, or texts alone */
} b2_text_side;

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
    b2_text_side text_side;          /* B2_TEXT_NONE: the next two are not read */
    int64_t vocab_size;              /* V */
    int64_t max_position_embeddings; /* P: tokens that a text may have */
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
    /* The same for text; absent unless the model reads text. */
    b2_weight text_intermediate_weight, text_intermediate_bias; /* [F, D], [F] */
    b2_weight text_output_weight, text_output_bias;             /* [D, F], [D] */
    b2_weight text_norm_weight, text_norm_bias;                 /* [D] */
} b2_qformer_layer;

typedef struct b2_qformer {
    b2_qformer_config config;
    b2_weight query_tokens;            /* [Q, D] */
    b2_weight norm_weight, norm_bias;  /* [D] */
    b2_weight word_embeddings;         /* [V, D]; absent unless the model reads text */
    b2_weight position_embeddings;     /* [P, D]; the same */
    b2_qformer_layer *layers;          /* [num_hidden_layers], owned */
    float *start;                      /* [Q, D], owned: the queries behind layer 0's self-attention, which without a text
                                        * are the same for every picture; NULL before b2_qformer_prepare */
    b2_memory *start_memory;           /* where it lies */
} b2_qformer;

/* Texts, one an item. */
typedef struct b2_texts {
    const int32_t *ids;      /* [N]; NULL: `embeds` instead */
    const float *embeds;     /* [N, D], before the norm */
    const int64_t *offsets;  /* [B + 1]: item b's are ids[offsets[b] - offsets[0] .. offsets[b + 1] - offsets[0]) */
    const uint8_t *mask;     /* [N], 0: a pad that nobody sees; NULL: none */
} b2_texts;

/* Whom the queries and the text of an item see in self-attention (BLIP-2 paper, figure 2). */
typedef enum b2_qformer_sees {
    B2_SEES_ALL = 0, /* ITM: each other */
    B2_SEES_BEFORE,  /* ITG: queries see queries; a token of the text sees the queries, itself and what stands before it */
    B2_SEES_OWN      /* ITC: queries see queries, the text sees the text: what each gives alone */
} b2_qformer_sees;

/* What one pass reads, item by item. */
typedef struct b2_qformer_in {
    int64_t items;             /* B */
    int64_t queries;           /* Q: rows of each item that look at its picture; 0: texts alone */
    b2_qformer_sees sees;
    b2_tensor image;           /* [M*T, E] of M pictures; not looked at without queries */
    int64_t pictures;          /* M, where items share pictures; 0: each item has its own */
    const int32_t *picture_of; /* [B]: below M; not looked at where each item has its own */
    const b2_texts *texts;     /* one an item; NULL: none */
    b2_tensor embeds;          /* [B*Q, D] in place of the model's own queries, before the norm; data NULL: those */
    const uint8_t *query_mask; /* [B, Q], 0: a query that nobody sees; NULL: none */
    const uint8_t *image_mask; /* [B, T], 0: a token of the picture that no query sees; NULL: none */
} b2_qformer_in;

/* Last hidden states; data NULL where they are not wanted. */
typedef struct b2_qformer_out {
    b2_tensor queries; /* [B*Q, D] */
    b2_tensor text;    /* [N, D] */
} b2_qformer_out;

/* Items [first, ...) alone, of texts given as ids. */
static inline b2_texts b2_texts_from(b2_texts texts, int64_t first)
{
    int64_t skipped = texts.offsets[first] - texts.offsets[0];
    return (b2_texts){.ids = texts.ids + skipped,
                      .offsets = texts.offsets + first,
                      .mask = texts.mask ? texts.mask + skipped : NULL};
}

/* Ids in range, no item longer than the model has positions for; whether this model reads texts at all (texts NULL: the
 * caller has none). */
int b2_texts_check(const b2_qformer_config *config, const b2_texts *texts, int64_t items, b2_err *err);

int b2_qformer_bind(b2_qformer *qformer, const b2_qformer_config *config, b2_binder *binder, b2_err *err);
int b2_qformer_visit(const b2_qformer *qformer, b2_weight_visitor *visitor, b2_err *err);
void b2_qformer_release(b2_qformer *qformer);

/* Computes what every picture shares. Reserves the arena itself. */
int b2_qformer_prepare(b2_ctx *ctx, b2_qformer *qformer, b2_err *err);

/* Arena bytes for `items` at once, each with `queries` (Q, or 0) and a text of at most `longest_text`, which look at
 * `pictures` of `image_tokens` (T) embeddings each. */
size_t b2_qformer_scratch(const b2_ctx *ctx, const b2_qformer *qformer, int64_t items, int64_t queries, int64_t pictures,
                          int64_t image_tokens, int64_t longest_text);

/* Taps: "qformer" the queries (and their attention over queries and text), "qformer_text" the texts, "qformer_cross" the
 * attention to the picture: for each query and head what every token of the picture weighs. */
int b2_qformer_forward(b2_ctx *ctx, const b2_qformer *qformer, const b2_qformer_out *out, const b2_qformer_in *in,
                       b2_err *err);

#endif
