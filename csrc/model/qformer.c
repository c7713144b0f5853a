#include "model/qformer.h"

#include <stddef.h>

#include "core/memory.h"
#include "model/stage.h"

#define AT(field) offsetof(b2_qformer, field)
#define LAYER_AT(field) offsetof(b2_qformer_layer, field)
#define COUNT(table) (sizeof(table) / sizeof *(table))

static const b2_weight_row top_table[] = {
    {"query_tokens", AT(query_tokens), B2_TABLE, {B2_DIM_1, B2_DIM_Q, B2_DIM_D}},
    {"qformer.layernorm.weight", AT(norm_weight), B2_VECTOR, {B2_DIM_D}},
    {"qformer.layernorm.bias", AT(norm_bias), B2_VECTOR, {B2_DIM_D}},
};

#define LAYER "qformer.encoder.layer.%d."
#define ATTENTION_ROWS(part, field, input) \
    {LAYER part ".attention.query.weight", LAYER_AT(field.query_weight), B2_MATRIX_ITEM, {B2_DIM_D, B2_DIM_D}}, \
    {LAYER part ".attention.query.bias", LAYER_AT(field.query_bias), B2_VECTOR, {B2_DIM_D}}, \
    {LAYER part ".attention.key.weight", LAYER_AT(field.key_weight), B2_MATRIX_ITEM, {B2_DIM_D, input}}, \
    {LAYER part ".attention.key.bias", LAYER_AT(field.key_bias), B2_VECTOR, {B2_DIM_D}}, \
    {LAYER part ".attention.value.weight", LAYER_AT(field.value_weight), B2_MATRIX_ITEM, {B2_DIM_D, input}}, \
    {LAYER part ".attention.value.bias", LAYER_AT(field.value_bias), B2_VECTOR, {B2_DIM_D}}, \
    {LAYER part ".output.dense.weight", LAYER_AT(field.dense_weight), B2_MATRIX_ITEM, {B2_DIM_D, B2_DIM_D}}, \
    {LAYER part ".output.dense.bias", LAYER_AT(field.dense_bias), B2_VECTOR, {B2_DIM_D}}, \
    {LAYER part ".output.LayerNorm.weight", LAYER_AT(field.norm_weight), B2_VECTOR, {B2_DIM_D}}, \
    {LAYER part ".output.LayerNorm.bias", LAYER_AT(field.norm_bias), B2_VECTOR, {B2_DIM_D}}

static const b2_weight_row layer_table[] = {
    ATTENTION_ROWS("attention", self_attention, B2_DIM_D),
    {LAYER "intermediate_query.dense.weight", LAYER_AT(intermediate_weight), B2_MATRIX_ITEM, {B2_DIM_F, B2_DIM_D}},
    {LAYER "intermediate_query.dense.bias", LAYER_AT(intermediate_bias), B2_VECTOR, {B2_DIM_F}},
    {LAYER "output_query.dense.weight", LAYER_AT(output_weight), B2_MATRIX_ITEM, {B2_DIM_D, B2_DIM_F}},
    {LAYER "output_query.dense.bias", LAYER_AT(output_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "output_query.LayerNorm.weight", LAYER_AT(norm_weight), B2_VECTOR, {B2_DIM_D}},
    {LAYER "output_query.LayerNorm.bias", LAYER_AT(norm_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row cross_table[] = {ATTENTION_ROWS("crossattention", cross_attention, B2_DIM_E)};

static int has_cross_attention(const b2_qformer_config *config, int layer)
{
    return layer % config->cross_attention_frequency == 0;
}

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_qformer_config *config)
{
    dims[B2_DIM_1] = 1;
    dims[B2_DIM_D] = config->hidden_size;
    dims[B2_DIM_F] = config->intermediate_size;
    dims[B2_DIM_E] = config->encoder_hidden_size;
    dims[B2_DIM_Q] = config->num_query_tokens;
}

int b2_qformer_bind(b2_qformer *qformer, const b2_qformer_config *config, b2_binder *binder, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, config);
    binder->dims = dims;
    qformer->config = *config;
    qformer->layers =
        b2_alloc_zeroed((size_t)config->num_hidden_layers, sizeof *qformer->layers, "Q-Former layers", err);
    if (!qformer->layers || b2_bind(binder, qformer, top_table, COUNT(top_table), err) < 0)
        return -1;
    for (int i = 0; i < config->num_hidden_layers; i++) {
        binder->layer = i;
        if (b2_bind(binder, &qformer->layers[i], layer_table, COUNT(layer_table), err) < 0)
            return -1;
        if (has_cross_attention(config, i) &&
            b2_bind(binder, &qformer->layers[i], cross_table, COUNT(cross_table), err) < 0)
            return -1;
    }
    return 0;
}

int b2_qformer_visit(const b2_qformer *qformer, b2_weight_visitor *visitor, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &qformer->config);
    if (b2_visit_weights(visitor, qformer, top_table, COUNT(top_table), dims, err) < 0)
        return -1;
    for (int i = 0; i < qformer->config.num_hidden_layers; i++)
        if (b2_visit_weights(visitor, &qformer->layers[i], layer_table, COUNT(layer_table), dims, err) < 0 ||
            b2_visit_weights(visitor, &qformer->layers[i], cross_table, COUNT(cross_table), dims, err) < 0)
            return -1;
    return 0;
}

void b2_qformer_release(b2_qformer *qformer)
{
    b2_release_weights(qformer, top_table, COUNT(top_table));
    for (int i = 0; qformer->layers && i < qformer->config.num_hidden_layers; i++) {
        b2_release_weights(&qformer->layers[i], layer_table, COUNT(layer_table));
        b2_release_weights(&qformer->layers[i], cross_table, COUNT(cross_table));
    }
    b2_free(qformer->layers);
    qformer->layers = NULL;
}

size_t b2_qformer_scratch(const b2_ctx *ctx, const b2_qformer *qformer, int64_t pictures, int64_t image_tokens)
{
    const b2_qformer_config *c = &qformer->config;
    int64_t queries = pictures * c->num_query_tokens, keys = pictures * b2_max64(image_tokens, c->num_query_tokens);
    int64_t widest = b2_max64(b2_max64(c->hidden_size, c->intermediate_size), c->encoder_hidden_size);
    return 3 * b2_arena_cost((size_t)(queries * c->hidden_size), sizeof(float)) +
           b2_arena_cost((size_t)(queries * c->intermediate_size), sizeof(float)) +
           2 * b2_arena_cost((size_t)(keys * c->hidden_size), sizeof(float)) +
           2 * b2_stage_attention_scratch(pictures) +
           b2_scratch_bytes(ctx, b2_max64(queries, keys), widest, b2_max64(image_tokens, c->num_query_tokens),
                            (int)(c->hidden_size / c->num_attention_heads));
}

/* The buffers of one forward pass, all of them from the arena. */
typedef struct buffers {
    b2_tensor x;     /* [B*Q, D] */
    b2_tensor q;     /* [B*Q, D] */
    b2_tensor h;     /* [B*Q, D] */
    b2_tensor inner; /* [B*Q, F] */
    float *k, *v;    /* [B*max(T, Q), D] */
    b2_stage_rows over_queries, over_image;
    int64_t image_tokens;
} buffers;

static int take_buffers(b2_ctx *ctx, buffers *w, const b2_qformer_config *c, int64_t pictures, int64_t image_tokens,
                        b2_err *err)
{
    int64_t queries = pictures * c->num_query_tokens;
    size_t keys = (size_t)(pictures * b2_max64(image_tokens, c->num_query_tokens) * c->hidden_size);
    w->image_tokens = image_tokens;
    if (b2_stage_take(ctx, &w->x, queries, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->q, queries, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->h, queries, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->inner, queries, c->intermediate_size, err) < 0)
        return -1;
    w->k = b2_arena_take(ctx->scratch, keys, sizeof *w->k, err);
    w->v = b2_arena_take(ctx->scratch, keys, sizeof *w->v, err);
    if (!w->k || !w->v)
        return -1;
    if (b2_stage_equal_rows(ctx, &w->over_queries, pictures, c->num_query_tokens, c->num_query_tokens, err) < 0)
        return -1;
    return b2_stage_equal_rows(ctx, &w->over_image, pictures, c->num_query_tokens, image_tokens, err);
}

/* x = LN(x + dense(attention(x . Wq, source . Wk, source . Wv))): self-attention when source is x itself. */
static int attend(b2_ctx *ctx, const b2_qformer_config *c, const char *stage, int i, const b2_qformer_attention *a,
                  buffers *w, b2_tensor source, int64_t source_tokens, const b2_stage_rows *rows, b2_err *err)
{
    b2_tensor k = b2_tensor_of(w->k, source.rows, c->hidden_size), v = b2_tensor_of(w->v, source.rows, c->hidden_size);
    int64_t queries = b2_item_rows(ctx, c->num_query_tokens);
    b2_linear_opts q_opts = {.bias = &a->query_bias, .item_rows = queries};
    b2_linear_opts k_opts = {.bias = &a->key_bias, .item_rows = b2_item_rows(ctx, source_tokens)};
    b2_linear_opts v_opts = {.bias = &a->value_bias, .item_rows = b2_item_rows(ctx, source_tokens)};
    b2_linear_opts dense = {.bias = &a->dense_bias, .residual = w->x, .item_rows = queries};
    if (b2_linear(ctx, w->q, w->x, &a->query_weight, &q_opts, err) < 0 ||
        b2_linear(ctx, k, source, &a->key_weight, &k_opts, err) < 0 ||
        b2_linear(ctx, v, source, &a->value_weight, &v_opts, err) < 0)
        return -1;
    b2_attention_args args = b2_stage_attention(rows, w->h, w->q, k, v, c->num_attention_heads);
    if (b2_stage_attend(ctx, stage, i, &args, err) < 0 ||
        b2_linear(ctx, w->x, w->h, &a->dense_weight, &dense, err) < 0)
        return -1;
    return b2_layer_norm(ctx, w->x, w->x, &a->norm_weight, &a->norm_bias, c->layer_norm_eps, err);
}

static int self_attention(b2_ctx *ctx, const b2_qformer *m, const b2_qformer_layer *layer, buffers *w, b2_err *err)
{
    return attend(ctx, &m->config, "qformer", (int)(layer - m->layers), &layer->self_attention, w, w->x,
                  m->config.num_query_tokens, &w->over_queries, err);
}

/* The queries look at the picture: keys and values are computed from its embeddings once per picture. */
static int cross_attention(b2_ctx *ctx, const b2_qformer *m, const b2_qformer_layer *layer, buffers *w,
                           b2_tensor image, b2_err *err)
{
    return attend(ctx, &m->config, "qformer_cross", (int)(layer - m->layers), &layer->cross_attention, w, image,
                  w->image_tokens, &w->over_image, err);
}

static int feed_forward(b2_ctx *ctx, const b2_qformer *m, const b2_qformer_layer *layer, buffers *w, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    int64_t queries = b2_item_rows(ctx, c->num_query_tokens);
    b2_linear_opts up = {.bias = &layer->intermediate_bias, .act = c->act, .item_rows = queries};
    b2_linear_opts down = {.bias = &layer->output_bias, .residual = w->x, .item_rows = queries};
    if (b2_linear(ctx, w->inner, w->x, &layer->intermediate_weight, &up, err) < 0 ||
        b2_linear(ctx, w->x, w->inner, &layer->output_weight, &down, err) < 0)
        return -1;
    return b2_layer_norm(ctx, w->x, w->x, &layer->norm_weight, &layer->norm_bias, c->layer_norm_eps, err);
}

static int embed(b2_ctx *ctx, const b2_qformer *m, buffers *w, int64_t pictures, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    b2_tensor queries = b2_tensor_of((float *)m->query_tokens.data, c->num_query_tokens, c->hidden_size);
    for (int64_t b = 0; b < pictures; b++)
        if (b2_layer_norm(ctx, b2_rows(w->x, b * queries.rows, queries.rows), queries, &m->norm_weight, &m->norm_bias,
                          c->layer_norm_eps, err) < 0)
            return -1;
    return b2_stage_done(ctx, "qformer", 0, w->x, err);
}

int b2_qformer_forward(b2_ctx *ctx, const b2_qformer *m, b2_tensor out, b2_tensor image, int64_t pictures, b2_err *err)
{
    size_t mark = b2_arena_mark(ctx->scratch);
    buffers w;
    if (take_buffers(ctx, &w, &m->config, pictures, image.rows / pictures, err) < 0 ||
        embed(ctx, m, &w, pictures, err) < 0)
        return -1;
    for (int i = 0; i < m->config.num_hidden_layers; i++) {
        const b2_qformer_layer *layer = &m->layers[i];
        if (self_attention(ctx, m, layer, &w, err) < 0)
            return -1;
        if (has_cross_attention(&m->config, i) && cross_attention(ctx, m, layer, &w, image, err) < 0)
            return -1;
        if (feed_forward(ctx, m, layer, &w, err) < 0 || b2_stage_done(ctx, "qformer", i + 1, w.x, err) < 0)
            return -1;
    }
    int status = b2_copy_rows(ctx, out, NULL, w.x, NULL, out.rows, err);
    b2_arena_reset(ctx->scratch, mark);
    return status;
}
