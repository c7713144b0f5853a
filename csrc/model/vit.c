#include "model/vit.h"

#include <stddef.h>

#include "core/memory.h"
#include "model/stage.h"
#include "ops/weights.h"

#define AT(field) offsetof(b2_vit, field)
#define LAYER_AT(field) offsetof(b2_vit_layer, field)

static const b2_weight_row embedding_table[] = {
    {"vision_model.embeddings.class_embedding", AT(class_embedding), B2_TABLE, {B2_DIM_1, B2_DIM_1, B2_DIM_D}},
    {"vision_model.embeddings.position_embedding", AT(position_embedding), B2_TABLE, {B2_DIM_1, B2_DIM_T, B2_DIM_D}},
    {"vision_model.embeddings.patch_embedding.weight", AT(patch_weight), B2_MATRIX_ITEM,
     {B2_DIM_D, B2_DIM_C, B2_DIM_P, B2_DIM_P}},
    {"vision_model.embeddings.patch_embedding.bias", AT(patch_bias), B2_VECTOR, {B2_DIM_D}},
    {"vision_model.post_layernorm.weight", AT(post_layernorm_weight), B2_VECTOR, {B2_DIM_D}},
    {"vision_model.post_layernorm.bias", AT(post_layernorm_bias), B2_VECTOR, {B2_DIM_D}},
};

#define LAYER "vision_model.encoder.layers.%d."
static const b2_weight_row layer_table[] = {
    {LAYER "layer_norm1.weight", LAYER_AT(layer_norm1_weight), B2_VECTOR, {B2_DIM_D}},
    {LAYER "layer_norm1.bias", LAYER_AT(layer_norm1_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "self_attn.qkv.weight", LAYER_AT(qkv_weight), B2_MATRIX_ITEM, {B2_DIM_3D, B2_DIM_D}},
    {LAYER "self_attn.projection.weight", LAYER_AT(projection_weight), B2_MATRIX_ITEM, {B2_DIM_D, B2_DIM_D}},
    {LAYER "self_attn.projection.bias", LAYER_AT(projection_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "layer_norm2.weight", LAYER_AT(layer_norm2_weight), B2_VECTOR, {B2_DIM_D}},
    {LAYER "layer_norm2.bias", LAYER_AT(layer_norm2_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "mlp.fc1.weight", LAYER_AT(fc1_weight), B2_MATRIX_ITEM, {B2_DIM_F, B2_DIM_D}},
    {LAYER "mlp.fc1.bias", LAYER_AT(fc1_bias), B2_VECTOR, {B2_DIM_F}},
    {LAYER "mlp.fc2.weight", LAYER_AT(fc2_weight), B2_MATRIX_ITEM, {B2_DIM_D, B2_DIM_F}},
    {LAYER "mlp.fc2.bias", LAYER_AT(fc2_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row qkv_bias_row = {LAYER "self_attn.qkv.bias", LAYER_AT(qkv_bias), B2_VECTOR, {B2_DIM_3D}};

#define COUNT(table) (sizeof(table) / sizeof *(table))

int64_t b2_vit_tokens(const b2_vit_config *config, int64_t height, int64_t width)
{
    return 1 + height / config->patch_size * (width / config->patch_size);
}

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_vit_config *config)
{
    dims[B2_DIM_1] = 1;
    dims[B2_DIM_D] = config->hidden_size;
    dims[B2_DIM_3D] = 3 * config->hidden_size;
    dims[B2_DIM_F] = config->intermediate_size;
    dims[B2_DIM_T] = b2_vit_tokens(config, config->image_size, config->image_size);
    dims[B2_DIM_C] = config->num_channels;
    dims[B2_DIM_P] = config->patch_size;
}

/* LAVIS-style files keep only the biases that are not zero: q_bias and v_bias, [D] each. */
static int bind_split_bias(b2_vit_layer *layer, b2_binder *binder, b2_err *err)
{
    static const unsigned char shape[] = {B2_DIM_D, B2_DIM_END};
    const char *q_name = b2_binder_name(binder, LAYER "self_attn.q_bias", err);
    const char *v_name = q_name ? b2_binder_name(binder, LAYER "self_attn.v_bias", err) : NULL;
    const char *name = v_name ? b2_binder_name(binder, qkv_bias_row.name, err) : NULL;
    if (!name)
        return -1;
    const b2_st_tensor *parts[2] = {b2_binder_find(binder, q_name, shape, err),
                                    b2_binder_find(binder, v_name, shape, err)};
    if (err->code != B2_OK)
        return -1;
    if (!parts[0] || !parts[1])
        return b2_fail(err, B2_E_FORMAT, "%s: missing from the checkpoint (nor are there q_bias and v_bias)", name);
    int64_t width = binder->dims[B2_DIM_D];
    float *bias = b2_alloc_zeroed((size_t)(3 * width), sizeof *bias, name, err);
    if (!bias)
        return -1;
    layer->qkv_bias = (b2_weight){
        .name = name, .data = bias, .n = 3 * width, .k = 1, .dtype = B2_F32, .layout = B2_ROWS, .owned = 1, .version = 1};
    for (int i = 0; i < 2; i++) {
        b2_weight stored;
        if (b2_stored_view(&stored, parts[i], 1, err) < 0)
            return -1;
        b2_convert(bias + 2 * i * width, B2_F32, stored.data, stored.dtype, width);
    }
    return 0;
}

static int bind_layer(b2_vit_layer *layer, const b2_vit_config *config, b2_binder *binder, b2_err *err)
{
    if (b2_bind(binder, layer, layer_table, COUNT(layer_table), err) < 0)
        return -1;
    if (!config->qkv_bias)
        return 0;
    int found = 0;
    if (b2_bind_optional(binder, layer, &qkv_bias_row, &found, err) < 0)
        return -1;
    return found ? 0 : bind_split_bias(layer, binder, err);
}

int b2_vit_bind(b2_vit *vit, const b2_vit_config *config, b2_binder *binder, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, config);
    binder->dims = dims;
    vit->config = *config;
    vit->layers = b2_alloc_zeroed((size_t)config->num_hidden_layers, sizeof *vit->layers, "vision layers", err);
    if (!vit->layers || b2_bind(binder, vit, embedding_table, COUNT(embedding_table), err) < 0)
        return -1;
    for (int i = 0; i < config->num_hidden_layers; i++) {
        binder->layer = i;
        if (bind_layer(&vit->layers[i], config, binder, err) < 0)
            return -1;
    }
    return 0;
}

int b2_vit_visit(const b2_vit *vit, b2_weight_visitor *visitor, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &vit->config);
    if (b2_visit_weights(visitor, vit, embedding_table, COUNT(embedding_table), dims, err) < 0)
        return -1;
    for (int i = 0; i < vit->config.num_hidden_layers; i++)
        if (b2_visit_weights(visitor, &vit->layers[i], layer_table, COUNT(layer_table), dims, err) < 0 ||
            b2_visit_weights(visitor, &vit->layers[i], &qkv_bias_row, 1, dims, err) < 0)
            return -1;
    return 0;
}

void b2_vit_release(b2_vit *vit)
{
    b2_release_weights(vit, embedding_table, COUNT(embedding_table));
    for (int i = 0; vit->layers && i < vit->config.num_hidden_layers; i++) {
        b2_release_weights(&vit->layers[i], layer_table, COUNT(layer_table));
        b2_release_weights(&vit->layers[i], &qkv_bias_row, 1);
    }
    b2_free(vit->layers);
    vit->layers = NULL;
}

static int64_t wide_columns(const b2_vit_config *config)
{
    int64_t patch = config->num_channels * config->patch_size * config->patch_size;
    return b2_max64(b2_max64(3 * config->hidden_size, patch), config->intermediate_size);
}

size_t b2_vit_scratch(const b2_ctx *ctx, const b2_vit *vit, b2_pictures pictures)
{
    const b2_vit_config *c = &vit->config;
    int64_t tokens = b2_vit_tokens(c, pictures.height, pictures.width), rows = pictures.count * tokens;
    return 2 * b2_arena_cost((size_t)(rows * c->hidden_size), sizeof(float)) +
           b2_arena_cost((size_t)(rows * wide_columns(c)), sizeof(float)) +
           3 * b2_arena_cost((size_t)(rows + 1), sizeof(int32_t)) +
           b2_stage_attention_scratch(pictures.count) +
           b2_scratch_bytes(ctx, rows, wide_columns(c), tokens, (int)(c->hidden_size / c->num_attention_heads));
}

/* The buffers of one forward pass, all of them from the arena. */
typedef struct buffers {
    b2_tensor x;                 /* [B*T, D] the residual stream */
    b2_tensor h;                 /* [B*T, D] */
    float *wide;                 /* [B*T, max(3D, F, C*P*P)] */
    int32_t *class_rows;         /* [B]: where the class tokens go ... */
    int32_t *class_from;         /* [B]: ... and where they come from: 0 */
    int32_t *patch_rows;         /* [B*(T-1)]: where the patches go */
    int64_t tokens;              /* T */
    b2_stage_rows pictures;
} buffers;

static int take_buffers(b2_ctx *ctx, buffers *w, const b2_vit_config *c, int64_t pictures, int64_t tokens, b2_err *err)
{
    int64_t rows = pictures * tokens;
    w->tokens = tokens;
    if (b2_stage_take(ctx, &w->x, rows, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->h, rows, c->hidden_size, err) < 0)
        return -1;
    w->wide = b2_arena_take(ctx->activations, (size_t)(rows * wide_columns(c)), sizeof *w->wide, err);
    w->class_rows = b2_arena_take(ctx->scratch, (size_t)pictures, sizeof *w->class_rows, err);
    w->class_from = b2_arena_take(ctx->scratch, (size_t)pictures, sizeof *w->class_from, err);
    w->patch_rows = b2_arena_take(ctx->scratch, (size_t)rows, sizeof *w->patch_rows, err);
    if (!w->wide || !w->class_rows || !w->class_from || !w->patch_rows)
        return -1;
    for (int64_t b = 0, i = 0; b < pictures; b++) {
        w->class_rows[b] = (int32_t)(b * tokens);
        w->class_from[b] = 0;
        for (int64_t t = 1; t < tokens; t++)
            w->patch_rows[i++] = (int32_t)(b * tokens + t);
    }
    return b2_stage_equal_rows(ctx, &w->pictures, pictures, tokens, tokens, err);
}

static int embed(b2_ctx *ctx, const b2_vit *vit, buffers *w, b2_pictures pictures, b2_tensor positions, b2_err *err)
{
    const b2_vit_config *c = &vit->config;
    int64_t count = w->tokens - 1;
    b2_tensor flat = b2_tensor_of(w->wide, pictures.count * count, c->num_channels * c->patch_size * c->patch_size);
    b2_tensor patches = b2_rows(w->h, 0, pictures.count * count);
    b2_tensor class_token = b2_tensor_of((float *)vit->class_embedding.data, 1, c->hidden_size);
    b2_linear_opts opts = {.bias = &vit->patch_bias, .item_rows = b2_item_rows(ctx, count)};
    if (b2_patches(ctx, flat, pictures, c->patch_size, err) < 0 ||
        b2_linear(ctx, patches, flat, &vit->patch_weight, &opts, err) < 0 ||
        b2_copy_rows(ctx, w->x, w->patch_rows, patches, NULL, pictures.count * count, err) < 0 ||
        b2_copy_rows(ctx, w->x, w->class_rows, class_token, w->class_from, pictures.count, err) < 0)
        return -1;
    return b2_add_rows(ctx, w->x, positions, err);
}

/* x += projection(attention(LN1(x))) */
static int self_attention(b2_ctx *ctx, const b2_vit *vit, const b2_vit_layer *layer, buffers *w, b2_err *err)
{
    const b2_vit_config *c = &vit->config;
    int64_t width = c->hidden_size, tokens = w->tokens;
    b2_tensor qkv = b2_tensor_of(w->wide, w->x.rows, 3 * width);
    b2_linear_opts to_qkv = {.bias = &layer->qkv_bias, .item_rows = b2_item_rows(ctx, tokens)};
    b2_linear_opts out = {.bias = &layer->projection_bias, .residual = w->x, .item_rows = b2_item_rows(ctx, tokens)};
    if (b2_layer_norm(ctx, w->h, w->x, &layer->layer_norm1_weight, &layer->layer_norm1_bias, c->layer_norm_eps,
                      err) < 0 ||
        b2_linear(ctx, qkv, w->h, &layer->qkv_weight, &to_qkv, err) < 0)
        return -1;
    b2_attention_args args = b2_stage_attention(&w->pictures, w->h, b2_cols(qkv, 0, width), b2_cols(qkv, width, width),
                                                b2_cols(qkv, 2 * width, width), c->num_attention_heads);
    args.operands = b2_operands_of(&layer->qkv_weight);
    if (b2_stage_attend(ctx, "vision", (int)(layer - vit->layers), &args, err) < 0)
        return -1;
    return b2_linear(ctx, w->x, w->h, &layer->projection_weight, &out, err);
}

/* x += fc2(act(fc1(LN2(x)))) */
static int feed_forward(b2_ctx *ctx, const b2_vit *vit, const b2_vit_layer *layer, buffers *w, b2_err *err)
{
    const b2_vit_config *c = &vit->config;
    int64_t tokens = w->tokens;
    b2_tensor inner = b2_tensor_of(w->wide, w->x.rows, c->intermediate_size);
    b2_linear_opts up = {.bias = &layer->fc1_bias, .act = c->act, .item_rows = b2_item_rows(ctx, tokens)};
    b2_linear_opts down = {.bias = &layer->fc2_bias, .residual = w->x, .item_rows = b2_item_rows(ctx, tokens)};
    if (b2_layer_norm(ctx, w->h, w->x, &layer->layer_norm2_weight, &layer->layer_norm2_bias, c->layer_norm_eps,
                      err) < 0 ||
        b2_linear(ctx, inner, w->h, &layer->fc1_weight, &up, err) < 0)
        return -1;
    return b2_linear(ctx, w->x, inner, &layer->fc2_weight, &down, err);
}

int b2_vit_forward(b2_ctx *ctx, const b2_vit *vit, b2_tensor out, b2_pictures pictures, b2_tensor positions,
                   b2_err *err)
{
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    buffers w;
    if (take_buffers(ctx, &w, &vit->config, pictures.count, positions.rows, err) < 0 ||
        embed(ctx, vit, &w, pictures, positions, err) < 0 || b2_stage_done(ctx, "vision", 0, w.x, err) < 0)
        return -1;
    for (int i = 0; i < vit->config.num_hidden_layers; i++)
        if (self_attention(ctx, vit, &vit->layers[i], &w, err) < 0 ||
            feed_forward(ctx, vit, &vit->layers[i], &w, err) < 0 || b2_stage_done(ctx, "vision", i + 1, w.x, err) < 0)
            return -1;
    int status = b2_layer_norm(ctx, out, w.x, &vit->post_layernorm_weight, &vit->post_layernorm_bias,
                               vit->config.layer_norm_eps, err);
    b2_ctx_reset(ctx, mark);
    return status;
}

int b2_vit_pool(b2_ctx *ctx, const b2_vit *vit, b2_tensor out, b2_tensor hidden, b2_err *err)
{
    b2_tensor class_tokens = hidden; /* every T-th row */
    class_tokens.ld = hidden.ld * (hidden.rows / out.rows);
    class_tokens.rows = out.rows;
    return b2_layer_norm(ctx, out, class_tokens, &vit->post_layernorm_weight, &vit->post_layernorm_bias,
                         vit->config.layer_norm_eps, err);
}
