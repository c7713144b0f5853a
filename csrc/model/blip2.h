/* BLIP-2: vision encoder, Q-Former, and what they are for: projection and language model (transformers'
 * Blip2ForConditionalGeneration), or the heads of retrieval (Blip2ForImageTextRetrieval and its halves).
 *
 * A `b2_blip2` is immutable once loaded and may be shared by threads. It owns its packed weights and the mapped
 * checkpoint that the others point into. */
#ifndef B2_MODEL_BLIP2_H
#define B2_MODEL_BLIP2_H

#include "model/heads.h"
#include "model/lm.h"
#include "model/qformer.h"
#include "model/vit.h"

/* Which parts a model has; the Q-Former always. */
typedef struct b2_blip2_config {
    int has_vision, has_text, has_heads;
    b2_vit_config vision;
    b2_qformer_config qformer;
    b2_lm_config text;
    b2_heads_config heads;
} b2_blip2_config;

typedef struct b2_blip2 {
    b2_checkpoint checkpoint;      /* owned */
    char **names;                  /* [name_count], owned weight names */
    int64_t name_count;
    b2_vit vit;
    b2_qformer qformer;
    b2_weight projection_weight;   /* language_projection: [D_lm, D_qformer] */
    b2_weight projection_bias;     /* [D_lm] */
    b2_lm *lm;                     /* owned; NULL: a model of retrieval, which has no projection to it either */
    b2_heads heads;                /* absent weights where the config has none */
    b2_dtype dtypes[B2_PART_COUNT];/* of each part: int4 or int8 if any matrix is, else what holds most bytes */
    b2_dtype dtype;                /* in which most of all bytes are held */
    b2_memory *memory;             /* where the weights are; NULL: the processor's */
    int64_t bytes;                 /* of all weights as held */
    int64_t parameters;            /* elements of all weights */
    char policies[B2_POLICIES_TEXT]; /* what was asked for, or what the packed file was made for */
} b2_blip2;

/* Opens the files and binds every weight. `model` is filled in, or left empty on failure. A file of packed weights
 * (io/packed.h) is used where it lies: the policies must be those that it was made for, or B2_HOLD_STORED all.
 * memory: of the device that all weights go to; NULL: the processor. */
int b2_blip2_load(b2_blip2 *model, const b2_blip2_config *config, const char *const *paths, int64_t path_count,
                  const b2_dtype_policy policies[B2_PART_COUNT], b2_memory *memory, b2_pool *pool, b2_cancel *cancel,
                  b2_err *err);
/* Computes what every picture shares, once, after loading. Reserves the arena itself. */
int b2_blip2_prepare(b2_ctx *ctx, b2_blip2 *model, b2_err *err);
void b2_blip2_release(b2_blip2 *model);

/* All weights as they are held into one file, which b2_blip2_load maps. `metadata` [2 * metadata_count] key, value: what
 * the file is to say besides. */
int b2_blip2_save_packed(const b2_blip2 *model, const char *path, const char *const *metadata, int64_t metadata_count,
                         b2_cancel *cancel, b2_err *err);

/* Every weight by name, for saving. */
int b2_blip2_visit(const b2_blip2 *model, b2_weight_visitor *visitor, b2_err *err);

/* What the pictures' way through the encoder leaves behind; data NULL where it is not wanted. If nothing behind the vision
 * encoder is, it runs alone. */
typedef struct b2_encoded {
    b2_tensor vision;   /* [B*T, D_v]: last hidden state after post_layernorm */
    b2_tensor pooled;   /* [B, D_v] */
    b2_tensor qformer;  /* [B*Q, D_q] */
    b2_tensor text;     /* [N, D_q]: of the texts beside the pictures */
    b2_tensor features; /* [B*Q, D_lm]: what the language model reads */
    b2_tensor embeds;   /* [B*Q, P]: vision_projection, rows of length 1 */
    b2_tensor match;    /* [B, 2]: logits of whether picture and text belong together: no, yes */
} b2_encoded;

/* Pictures -> out; all of both are outside (b2_bring_in). Where they have not the size that the model was trained on, its positions are interpolated.
 * pictures.data NULL: out->vision holds `count` pictures' image embeddings already, of any number of tokens each.
 * texts: what the Q-Former reads beside each picture, or NULL where it reads none. Reserves the arena itself; pictures go
 * through in groups that bound its size, which changes no bit. */
int b2_blip2_encode(b2_ctx *ctx, const b2_blip2 *model, const b2_encoded *out, b2_pictures pictures,
                    const b2_texts *texts, b2_err *err);

/* out [N, D_lm] = language_projection(x [N, D_q]) alone. Reserves the arena itself. */
int b2_blip2_project(b2_ctx *ctx, const b2_blip2 *model, b2_tensor out, b2_tensor x, b2_err *err);
/* out [N, D_lm] = the language model's embeddings of ids [N]. Reserves the arena itself. */
int b2_blip2_embed(b2_ctx *ctx, const b2_blip2 *model, b2_tensor out, const int32_t *ids, b2_err *err);

#endif
