/* OPT (transformers' OPTForCausalLM): learned positions from the mask, pre- or post-norm, relu, tied or own head.
 *
 *     x = embed_tokens(ids) + embed_positions(position + 2)
 *     x += out_proj(attention(LN(x)));  x += fc2(act(fc1(LN(x))))     for every layer (norm after the sum if
 *                                                                      do_layer_norm_before is false)
 *     logits = LN_final(x) . lm_head^T
 *
 * With a tied head the embedding table is one packed weight with two uses: row gather and product. */
#include "model/lm.h"

#include <math.h>
#include <stddef.h>

#include "core/memory.h"
#include "model/stage.h"

typedef struct opt_layer {
    b2_weight q_weight, q_bias;       /* [D, D], [D] */
    b2_weight k_weight, k_bias;
    b2_weight v_weight, v_bias;
    b2_weight out_weight, out_bias;
    b2_weight attention_norm_weight, attention_norm_bias; /* [D] */
    b2_weight fc1_weight, fc1_bias;   /* [F, D], [F] */
    b2_weight fc2_weight, fc2_bias;   /* [D, F], [D] */
    b2_weight final_norm_weight, final_norm_bias; /* [D], of the feed-forward */
} opt_layer;

typedef struct opt {
    b2_lm base;
    b2_weight embed_tokens;    /* [V, D] */
    b2_weight embed_positions; /* [max + 2, D] */
    b2_weight final_norm_weight, final_norm_bias; /* [D]; absent if post-norm or removed */
    b2_weight lm_head;         /* [V, D]; absent when tied */
    opt_layer *layers;         /* owned */
} opt;

/* OPT's position table begins with two rows that no token uses (padding_idx + 1). */
enum { POSITION_OFFSET = 2 };

#define AT(field) offsetof(opt, field)
#define LAYER_AT(field) offsetof(opt_layer, field)
#define COUNT(table) (sizeof(table) / sizeof *(table))
#define DECODER "language_model.model.decoder."
#define LAYER DECODER "layers.%d."

static const b2_weight_row positions_row = {DECODER "embed_positions.weight", AT(embed_positions), B2_TABLE,
                                            {B2_DIM_T, B2_DIM_D}};
static const b2_weight_row tokens_row = {DECODER "embed_tokens.weight", AT(embed_tokens), B2_VOCABULARY,
                                         {B2_DIM_V, B2_DIM_D}};
static const b2_weight_row head_row = {"language_model.lm_head.weight", AT(lm_head), B2_VOCABULARY,
                                       {B2_DIM_V, B2_DIM_D}};
static const b2_weight_row final_norm_table[] = {
    {DECODER "final_layer_norm.weight", AT(final_norm_weight), B2_VECTOR, {B2_DIM_D}},
    {DECODER "final_layer_norm.bias", AT(final_norm_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row layer_table[] = {
    {LAYER "self_attn.q_proj.weight", LAYER_AT(q_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_D}},
    {LAYER "self_attn.k_proj.weight", LAYER_AT(k_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_D}},
    {LAYER "self_attn.v_proj.weight", LAYER_AT(v_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_D}},
    {LAYER "self_attn.out_proj.weight", LAYER_AT(out_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_D}},
    {LAYER "fc1.weight", LAYER_AT(fc1_weight), B2_MATRIX, {B2_DIM_F, B2_DIM_D}},
    {LAYER "fc2.weight", LAYER_AT(fc2_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_F}},
};
static const b2_weight_row layer_bias_table[] = {
    {LAYER "self_attn.q_proj.bias", LAYER_AT(q_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "self_attn.k_proj.bias", LAYER_AT(k_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "self_attn.v_proj.bias", LAYER_AT(v_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "self_attn.out_proj.bias", LAYER_AT(out_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "fc1.bias", LAYER_AT(fc1_bias), B2_VECTOR, {B2_DIM_F}},
    {LAYER "fc2.bias", LAYER_AT(fc2_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row layer_norm_table[] = {
    {LAYER "self_attn_layer_norm.weight", LAYER_AT(attention_norm_weight), B2_VECTOR, {B2_DIM_D}},
    {LAYER "self_attn_layer_norm.bias", LAYER_AT(attention_norm_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "final_layer_norm.weight", LAYER_AT(final_norm_weight), B2_VECTOR, {B2_DIM_D}},
    {LAYER "final_layer_norm.bias", LAYER_AT(final_norm_bias), B2_VECTOR, {B2_DIM_D}},
};

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_lm_config *config)
{
    dims[B2_DIM_D] = config->hidden_size;
    dims[B2_DIM_F] = config->ffn_dim;
    dims[B2_DIM_V] = config->vocab_size;
    dims[B2_DIM_T] = config->max_position_embeddings + POSITION_OFFSET;
}

static int has_final_norm(const b2_lm_config *c)
{
    return c->do_layer_norm_before && !c->remove_final_layer_norm;
}

static int bind_layer(opt *m, int i, b2_binder *binder, b2_err *err)
{
    const b2_lm_config *c = &m->base.config;
    binder->layer = i;
    if (b2_bind(binder, &m->layers[i], layer_table, COUNT(layer_table), err) < 0)
        return -1;
    if (c->enable_bias && b2_bind(binder, &m->layers[i], layer_bias_table, COUNT(layer_bias_table), err) < 0)
        return -1;
    if (c->layer_norm_elementwise_affine &&
        b2_bind(binder, &m->layers[i], layer_norm_table, COUNT(layer_norm_table), err) < 0)
        return -1;
    return 0;
}

static int opt_bind(b2_lm *lm, b2_binder *binder, b2_err *err)
{
    opt *m = (opt *)lm;
    const b2_lm_config *c = &lm->config;
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, c);
    binder->dims = dims;
    lm->kv_layers = c->num_hidden_layers;
    lm->kv_width = c->hidden_size;
    m->layers = b2_alloc_zeroed((size_t)c->num_hidden_layers, sizeof *m->layers, "OPT layers", err);
    if (!m->layers || b2_bind_vocabulary(binder, m, &tokens_row, &head_row, c->tie_word_embeddings, err) < 0 ||
        b2_bind(binder, m, &positions_row, 1, err) < 0)
        return -1;
    if (has_final_norm(c) && c->layer_norm_elementwise_affine &&
        b2_bind(binder, m, final_norm_table, COUNT(final_norm_table), err) < 0)
        return -1;
    for (int i = 0; i < c->num_hidden_layers; i++)
        if (bind_layer(m, i, binder, err) < 0)
            return -1;
    return 0;
}

static int opt_visit(const b2_lm *lm, b2_weight_visitor *visitor, b2_err *err)
{
    const opt *m = (const opt *)lm;
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &lm->config);
    if (b2_visit_weights(visitor, m, &tokens_row, 1, dims, err) < 0 ||
        b2_visit_weights(visitor, m, &positions_row, 1, dims, err) < 0 ||
        b2_visit_weights(visitor, m, &head_row, 1, dims, err) < 0 ||
        b2_visit_weights(visitor, m, final_norm_table, COUNT(final_norm_table), dims, err) < 0)
        return -1;
    for (int i = 0; i < lm->config.num_hidden_layers; i++)
        if (b2_visit_weights(visitor, &m->layers[i], layer_table, COUNT(layer_table), dims, err) < 0 ||
            b2_visit_weights(visitor, &m->layers[i], layer_bias_table, COUNT(layer_bias_table), dims, err) < 0 ||
            b2_visit_weights(visitor, &m->layers[i], layer_norm_table, COUNT(layer_norm_table), dims, err) < 0)
            return -1;
    return 0;
}

static void opt_release(b2_lm *lm)
{
    opt *m = (opt *)lm;
    b2_release_weights(m, &tokens_row, 1);
    b2_release_weights(m, &positions_row, 1);
    b2_release_weights(m, &head_row, 1);
    b2_release_weights(m, final_norm_table, COUNT(final_norm_table));
    for (int i = 0; m->layers && i < lm->config.num_hidden_layers; i++) {
        b2_release_weights(&m->layers[i], layer_table, COUNT(layer_table));
        b2_release_weights(&m->layers[i], layer_bias_table, COUNT(layer_bias_table));
        b2_release_weights(&m->layers[i], layer_norm_table, COUNT(layer_norm_table));
    }
    b2_free(m->layers);
    m->layers = NULL;
}

static size_t opt_scratch(const b2_ctx *ctx, const b2_lm *lm, int64_t tokens, int64_t keys, int64_t logits)
{
    const b2_lm_config *c = &lm->config;
    int64_t widest = b2_max64(b2_max64(c->hidden_size, c->ffn_dim), c->vocab_size);
    return 4 * b2_arena_cost((size_t)(tokens * c->hidden_size), sizeof(float)) +
           b2_arena_cost((size_t)(tokens * c->ffn_dim), sizeof(float)) +
           b2_arena_cost((size_t)(logits * c->hidden_size), sizeof(float)) +
           b2_scratch_bytes(ctx, b2_max64(tokens, logits), widest, keys, (int)(c->hidden_size / c->num_attention_heads));
}

/* The buffers of one forward pass, all of them from the arena. */
typedef struct buffers {
    b2_tensor h;     /* [N, D] */
    b2_tensor q;     /* [N, D] */
    b2_tensor k, v;  /* [N, D] */
    b2_tensor inner; /* [N, F] */
} buffers;

static int take_buffers(b2_ctx *ctx, buffers *w, const b2_lm_config *c, int64_t tokens, b2_err *err)
{
    return b2_stage_take(ctx, &w->h, tokens, c->hidden_size, err) < 0 ||
                   b2_stage_take(ctx, &w->q, tokens, c->hidden_size, err) < 0 ||
                   b2_stage_take(ctx, &w->k, tokens, c->hidden_size, err) < 0 ||
                   b2_stage_take(ctx, &w->v, tokens, c->hidden_size, err) < 0 ||
                   b2_stage_take(ctx, &w->inner, tokens, c->ffn_dim, err) < 0
               ? -1
               : 0;
}

static int opt_embed(b2_ctx *ctx, const b2_lm *lm, b2_tensor out, const int32_t *ids, b2_err *err)
{
    return b2_embedding(ctx, out, &((const opt *)lm)->embed_tokens, ids, 0, 0, err);
}

static int add_positions(b2_ctx *ctx, const opt *m, b2_lm_batch *batch, b2_err *err)
{
    return b2_embedding(ctx, batch->x, &m->embed_positions, batch->positions, POSITION_OFFSET, 1, err);
}

/* w->h = attention over the cache, after this call's own keys and values have been put there. */
static int cached_attention(b2_ctx *ctx, const opt *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const b2_lm_config *c = &m->base.config;
    const opt_layer *layer = &m->layers[i];
    b2_linear_opts q_opts = {.bias = &layer->q_bias}, k_opts = {.bias = &layer->k_bias};
    b2_linear_opts v_opts = {.bias = &layer->v_bias};
    if (b2_linear(ctx, w->q, w->h, &layer->q_weight, &q_opts, err) < 0 ||
        b2_linear(ctx, w->k, w->h, &layer->k_weight, &k_opts, err) < 0 ||
        b2_linear(ctx, w->v, w->h, &layer->v_weight, &v_opts, err) < 0 ||
        b2_lm_store(ctx, batch, i, w->k, w->v, err) < 0)
        return -1;
    int head_dim = (int)(c->hidden_size / c->num_attention_heads);
    b2_attention_args args = b2_lm_attention(batch, i, w->h, w->q);
    args.heads = args.kv_heads = c->num_attention_heads;
    args.head_dim = head_dim;
    args.scale = 1.0f / sqrtf((float)head_dim);
    return b2_stage_attend(ctx, "language_model", i, &args, err);
}

static int norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *weight, const b2_weight *bias, b2_err *err)
{
    return b2_layer_norm(ctx, out, x, weight, bias, 1e-5f, err); /* torch's default: OPT's config has no eps */
}

static int self_attention(b2_ctx *ctx, const opt *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const opt_layer *layer = &m->layers[i];
    int before = m->base.config.do_layer_norm_before;
    b2_linear_opts out = {.bias = &layer->out_bias, .residual = batch->x};
    int status = before ? norm(ctx, w->h, batch->x, &layer->attention_norm_weight, &layer->attention_norm_bias, err)
                        : b2_copy_rows(ctx, w->h, NULL, batch->x, NULL, batch->x.rows, err);
    if (status < 0 || cached_attention(ctx, m, i, batch, w, err) < 0 ||
        b2_linear(ctx, batch->x, w->h, &layer->out_weight, &out, err) < 0)
        return -1;
    return before ? 0 : norm(ctx, batch->x, batch->x, &layer->attention_norm_weight, &layer->attention_norm_bias, err);
}

static int feed_forward(b2_ctx *ctx, const opt *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const opt_layer *layer = &m->layers[i];
    int before = m->base.config.do_layer_norm_before;
    b2_linear_opts up = {.bias = &layer->fc1_bias, .act = m->base.config.act};
    b2_linear_opts down = {.bias = &layer->fc2_bias, .residual = batch->x};
    if (before && norm(ctx, w->h, batch->x, &layer->final_norm_weight, &layer->final_norm_bias, err) < 0)
        return -1;
    if (b2_linear(ctx, w->inner, before ? w->h : batch->x, &layer->fc1_weight, &up, err) < 0 ||
        b2_linear(ctx, batch->x, w->inner, &layer->fc2_weight, &down, err) < 0)
        return -1;
    return before ? 0 : norm(ctx, batch->x, batch->x, &layer->final_norm_weight, &layer->final_norm_bias, err);
}

/* The last hidden states of every token, not only of those whose logits are wanted, for whoever watches. */
static int show_last(b2_ctx *ctx, const opt *m, b2_lm_batch *batch, const buffers *w, b2_err *err)
{
    int normed = has_final_norm(&m->base.config);
    if (!ctx->tap)
        return 0;
    if (normed && norm(ctx, w->h, batch->x, &m->final_norm_weight, &m->final_norm_bias, err) < 0)
        return -1;
    return b2_stage_tap(ctx, "language_model", m->base.config.num_hidden_layers + 1, normed ? w->h : batch->x, err);
}

static int head(b2_ctx *ctx, const opt *m, b2_lm_batch *batch, b2_err *err)
{
    const b2_weight *weight = m->lm_head.data ? &m->lm_head : &m->embed_tokens;
    b2_tensor last;
    if (batch->logits.rows == 0)
        return 0;
    if (b2_stage_take(ctx, &last, batch->logits.rows, batch->x.cols, err) < 0 ||
        b2_copy_rows(ctx, last, NULL, batch->x, batch->logit_rows, last.rows, err) < 0)
        return -1;
    if (has_final_norm(&m->base.config) && norm(ctx, last, last, &m->final_norm_weight, &m->final_norm_bias, err) < 0)
        return -1;
    return b2_lm_head(ctx, batch, last, weight, err);
}

static int opt_forward(b2_ctx *ctx, const b2_lm *lm, b2_lm_batch *batch, b2_err *err)
{
    const opt *m = (const opt *)lm;
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    buffers w;
    if (add_positions(ctx, m, batch, err) < 0 || take_buffers(ctx, &w, &lm->config, batch->x.rows, err) < 0 ||
        b2_stage_done(ctx, "language_model", 0, batch->x, err) < 0)
        return -1;
    for (int i = 0; i < lm->config.num_hidden_layers; i++)
        if (self_attention(ctx, m, i, batch, &w, err) < 0 || feed_forward(ctx, m, i, batch, &w, err) < 0 ||
            b2_stage_done(ctx, "language_model", i + 1, batch->x, err) < 0)
            return -1;
    int status = show_last(ctx, m, batch, &w, err) < 0 ? -1 : head(ctx, m, batch, err);
    b2_ctx_reset(ctx, mark);
    return status;
}

const b2_lm_class b2_opt_class = {
    .size = sizeof(opt),
    .bind = opt_bind,
    .visit = opt_visit,
    .release = opt_release,
    .scratch = opt_scratch,
    .embed = opt_embed,
    .forward = opt_forward,
};
