/* The language model behind the projection, whichever it is. A new one is a file that fills in `b2_lm_class` and one
 * line in lm.c, where models are chosen by their config's model_type. */
#ifndef B2_MODEL_LM_H
#define B2_MODEL_LM_H

#include "model/kv_cache.h"
#include "model/weight_table.h"
#include "ops/ops.h"

/* Relative positions have no end; a session counts tokens in 32 bits. */
#define B2_NO_POSITIONS ((int64_t)INT32_MAX)

/* What a config may ask for at most. */
enum { B2_MAX_LM_LAYERS = 1024, B2_MAX_HEAD_DIM = 1024 };

/* The union of what the language models' configs say; each reads what concerns it. */
typedef struct b2_lm_config {
    char model_type[32];
    int64_t hidden_size;             /* D */
    int64_t ffn_dim;                 /* F */
    int64_t vocab_size;              /* V */
    int64_t max_position_embeddings; /* positions a sequence may have; B2_NO_POSITIONS where nothing limits them */
    int num_hidden_layers;           /* of an encoder-decoder: of the encoder */
    int num_decoder_layers;          /* encoder-decoders only */
    int num_attention_heads;         /* H */
    int head_dim;                    /* Dh */
    float norm_eps;                  /* of RMS norms */
    b2_act act;                      /* of the feed-forward, or of its gate */
    int is_gated_act;
    int relative_attention_num_buckets; /* R */
    int64_t relative_attention_max_distance;
    int scale_decoder_outputs;       /* the head reads its input times D^-0.5 */
    int do_layer_norm_before;
    int remove_final_layer_norm;
    int enable_bias;
    int layer_norm_elementwise_affine;
    int tie_word_embeddings;
    /* The LLaMA family. */
    int num_key_value_heads;         /* Hkv, divides H */
    int qkv_bias, o_bias, mlp_bias;  /* which products have biases */
    int qk_norm;                     /* queries and keys go through a norm, head by head */
    int64_t sliding_window;          /* tokens that a layer with a window looks back, its own included */
    uint8_t slides[B2_MAX_LM_LAYERS];/* [num_hidden_layers] 1: this layer has the window */
    float inv_freq[B2_MAX_HEAD_DIM / 2]; /* [Dh/2] of rotary positions */
    float rope_scaling;              /* of cosines and sines */
} b2_lm_config;

/* One call of the model over packed tokens: prefill, decoding, or both. All pointers are in backend memory. */
typedef struct b2_lm_batch {
    b2_tensor x;                  /* [N, D] in: token embeddings or image features; overwritten */
    int64_t rows;                 /* sequences in this call */
    const int32_t *q_offsets;     /* [rows + 1] into the N tokens */
    const int32_t *positions;     /* [N]: number of real tokens before this one in its sequence, and of a pad -1; or as
                                   * forward_counts_pads says */
    b2_kv_cache *cache;
    const int32_t *cache_rows;    /* [N]: cache row of each token's key and value */
    const int32_t *prefix_starts; /* [rows]: what each sequence reads, as in b2_attention_args */
    const int32_t *prefix_lens;   /* [rows] */
    const int32_t *suffix_slots;  /* [rows, suffix_ld] or NULL */
    int64_t suffix_ld;
    const int32_t *suffix_lens;   /* [rows] or NULL */
    const uint8_t *key_mask;      /* [rows, key_mask_ld] or NULL */
    int64_t key_mask_ld;
    /* Encoder-decoders: what the decoder's cross-attention reads; NULL elsewhere. */
    const b2_kv_cache *cross;     /* filled by encode() */
    const int32_t *cross_starts;  /* [rows] */
    const int32_t *cross_lens;    /* [rows] */
    const uint8_t *cross_mask;    /* [rows, cross_mask_ld] or NULL */
    int64_t cross_mask_ld;
    const int32_t *logit_rows;    /* [logits.rows]: tokens whose logits are wanted; NULL: the first logits.rows */
    b2_tensor logits;             /* [.., V] out */
} b2_lm_batch;

typedef struct b2_lm b2_lm;

typedef struct b2_lm_class {
    size_t size; /* of the struct that begins with b2_lm */
    /* transformers' generate() numbers a row's real tokens, for every model. Its forward() alone does so for some; where
     * this is 1 it numbers every token, those that the mask hides too. */
    int forward_counts_pads;
    int (*bind)(b2_lm *lm, b2_binder *binder, b2_err *err);
    int (*visit)(const b2_lm *lm, b2_weight_visitor *visitor, b2_err *err);
    /* Those that were made from others and stand in no file; NULL: none. */
    int (*visit_made)(const b2_lm *lm, b2_weight_visitor *visitor, b2_err *err);
    void (*release)(b2_lm *lm);
    size_t (*scratch)(const b2_ctx *ctx, const b2_lm *lm, int64_t tokens, int64_t keys, int64_t logits);
    /* out [N, D] = embeddings of ids [N]; an id < 0 leaves its row. */
    int (*embed)(b2_ctx *ctx, const b2_lm *lm, b2_tensor out, const int32_t *ids, b2_err *err);
    int (*forward)(b2_ctx *ctx, const b2_lm *lm, b2_lm_batch *batch, b2_err *err);
    /* Encoder-decoders, else NULL. batch->x [N, D], prompts with their image features, goes through the encoder and
     * becomes its last hidden state; the keys and values that every decoder layer's cross-attention will read are left in
     * batch->cache at batch->cache_rows. The encoder sees each row's whole prompt, bidirectionally, under key_mask; positions,
     * prefix_*, suffix_* and logits are not read. forward() is then the decoder, with `cross` set. */
    int (*encode)(b2_ctx *ctx, const b2_lm *lm, b2_lm_batch *batch, b2_err *err);
    size_t (*encode_scratch)(const b2_ctx *ctx, const b2_lm *lm, int64_t tokens, int64_t longest_row);
} b2_lm_class;

struct b2_lm {
    const b2_lm_class *class_;
    b2_lm_config config;
    int kv_layers;    /* layers of the cache, and of the cross cache; set by bind */
    int64_t kv_width; /* Hkv * Dh; set by bind */
};

/* logits = x [.., D] . weight^T. What a token is chosen by is computed with fine activations (b2_rows_are), the same
 * whether it follows a prompt or another token; all logits of a text are not. */
int b2_lm_head(b2_ctx *ctx, const b2_lm_batch *batch, b2_tensor x, const b2_weight *weight, b2_err *err);

/* Puts this call's keys and values [N, kv_width] where layer `layer` of the cache wants them. */
int b2_lm_store(b2_ctx *ctx, const b2_lm_batch *batch, int layer, b2_tensor k, b2_tensor v, b2_err *err);
/* Causal self-attention of the call's queries over what that layer of the cache holds: all but heads, head_dim, scale and
 * whatever is special to a model. */
b2_attention_args b2_lm_attention(const b2_lm_batch *batch, int layer, b2_tensor out, b2_tensor q);

/* NULL for an unknown model_type. */
const b2_lm_class *b2_lm_class_of(const char *model_type);

extern const b2_lm_class b2_opt_class;
extern const b2_lm_class b2_t5_class;
extern const b2_lm_class b2_llama_class;

#endif
