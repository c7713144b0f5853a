/* The vision encoder: EVA-CLIP's ViT as transformers' Blip2VisionModel.
 *
 *     x  = [class; patches . W_patch + b] + positions
 *     x += proj(attention(LN1(x) . W_qkv + b));  x += fc2(gelu(fc1(LN2(x))))     for every layer
 *     out = LN_post(x) */
#ifndef B2_MODEL_VIT_H
#define B2_MODEL_VIT_H

#include "model/weight_table.h"
#include "ops/ops.h"

typedef struct b2_vit_config {
    int64_t image_size;   /* S, pixels */
    int64_t patch_size;   /* P */
    int64_t num_channels; /* C */
    int64_t hidden_size;  /* D */
    int64_t intermediate_size; /* F */
    int num_hidden_layers;
    int num_attention_heads;
    float layer_norm_eps;
    b2_act act;
    int qkv_bias;
} b2_vit_config;

typedef struct b2_vit_layer {
    b2_weight layer_norm1_weight, layer_norm1_bias; /* [D] */
    b2_weight qkv_weight;                           /* [3D, D]: queries, keys, values */
    b2_weight qkv_bias;                             /* [3D]: q | 0 | v; absent without qkv_bias */
    b2_weight projection_weight, projection_bias;   /* [D, D], [D] */
    b2_weight layer_norm2_weight, layer_norm2_bias; /* [D] */
    b2_weight fc1_weight, fc1_bias;                 /* [F, D], [F] */
    b2_weight fc2_weight, fc2_bias;                 /* [D, F], [D] */
} b2_vit_layer;

typedef struct b2_vit {
    b2_vit_config config;
    b2_weight class_embedding;                  /* [1, D] */
    b2_weight position_embedding;               /* [T, D], T = 1 + (S/P)^2 */
    b2_weight patch_weight, patch_bias;         /* [D, C*P*P], [D] */
    b2_weight post_layernorm_weight, post_layernorm_bias; /* [D] */
    b2_vit_layer *layers;                       /* [num_hidden_layers], owned */
} b2_vit;

/* Tokens of a picture of height x width: T. Both at least P. */
int64_t b2_vit_tokens(const b2_vit_config *config, int64_t height, int64_t width);

int b2_vit_bind(b2_vit *vit, const b2_vit_config *config, b2_binder *binder, b2_err *err);
int b2_vit_visit(const b2_vit *vit, b2_weight_visitor *visitor, b2_err *err);
void b2_vit_release(b2_vit *vit);

/* Positions for pictures of height x width: *positions [T, D] is the model's own table where the grid of patches is the
 * one it was trained on; else the grid interpolated to the pictures' (bicubic, A = -0.75, as torch's upsample_bicubic2d
 * with align_corners=False and antialias=False), taken from the arena. */
int b2_vit_positions(b2_ctx *ctx, const b2_vit *vit, b2_tensor *positions, int64_t height, int64_t width, b2_err *err);
/* Bytes that b2_vit_positions takes. */
size_t b2_vit_positions_scratch(const b2_vit *vit, int64_t height, int64_t width);

/* Bytes that b2_vit_forward takes from the arena, the operations' own scratch included; pictures.data is not read. */
size_t b2_vit_scratch(const b2_ctx *ctx, const b2_vit *vit, b2_pictures pictures);

/* out [B*T, D] = last hidden state after post_layernorm; positions [T, D] from b2_vit_positions. Taps: "vision". */
int b2_vit_forward(b2_ctx *ctx, const b2_vit *vit, b2_tensor out, b2_pictures pictures, b2_tensor positions,
                   b2_err *err);

/* out [B, D] = LN_post(class token of `hidden` [B*T, D]): transformers' pooler_output (normalised a second time). */
int b2_vit_pool(b2_ctx *ctx, const b2_vit *vit, b2_tensor out, b2_tensor hidden, b2_err *err);

#endif
