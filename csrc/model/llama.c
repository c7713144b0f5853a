/* The LLaMA family (transformers' LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM): rotary
 * positions, RMS norms, a gated feed-forward, key heads shared by groups of query heads.
 *
 *     x  = embed_tokens(ids)
 *     h  = RMS(x);  q, k = rope(norm(h . Wq), norm(h . Wk))         the inner norms, per head, in Qwen3 only
 *     x += o_proj(attention(q, k, h . Wv))                          over a sliding window where the layer has one
 *     x += down_proj(act(gate_proj(RMS(x))) * up_proj(RMS(x)))      for every layer
 *     logits = RMS(x) . lm_head^T
 *
 * What tells the members apart stands in their config: which products have biases, inner norms, windows. */
#include "model/lm.h"

#include <math.h>
#include <stddef.h>

#include "core/memory.h"
#include "model/stage.h"

typedef struct llama_layer {
    b2_weight input_norm;         /* [D] */
    b2_weight q_weight, q_bias;   /* [H*Dh, D], [H*Dh] */
    b2_weight k_weight, k_bias;   /* [Hkv*Dh, D], [Hkv*Dh] */
    b2_weight v_weight, v_bias;
    b2_weight q_norm, k_norm;     /* [Dh] */
    b2_weight o_weight, o_bias;   /* [D, H*Dh], [D] */
    b2_weight post_norm;          /* [D], of the feed-forward */
    b2_weight gate_weight, gate_bias; /* [F, D], [F] */
    b2_weight up_weight, up_bias;
    b2_weight down_weight, down_bias; /* [D, F], [D] */
} llama_layer;

typedef struct llama {
    b2_lm base;
    b2_weight embed_tokens; /* [V, D] */
    b2_weight norm;         /* [D] */
    b2_weight lm_head;      /* [V, D]; absent when tied */
    llama_layer *layers;    /* owned */
} llama;

#define AT(field) offsetof(llama, field)
#define LAYER_AT(field) offsetof(llama_layer, field)
#define COUNT(table) (sizeof(table) / sizeof *(table))
#define MODEL "language_model.model."
#define LAYER MODEL "layers.%d."

static const b2_weight_row tokens_row = {MODEL "embed_tokens.weight", AT(embed_tokens), B2_VOCABULARY,
                                         {B2_DIM_V, B2_DIM_D}};
static const b2_weight_row head_row = {"language_model.lm_head.weight", AT(lm_head), B2_VOCABULARY,
                                       {B2_DIM_V, B2_DIM_D}};
static const b2_weight_row norm_row = {MODEL "norm.weight", AT(norm), B2_VECTOR, {B2_DIM_D}};
static const b2_weight_row layer_table[] = {
    {LAYER "input_layernorm.weight", LAYER_AT(input_norm), B2_VECTOR, {B2_DIM_D}},
    {LAYER "self_attn.q_proj.weight", LAYER_AT(q_weight), B2_MATRIX, {B2_DIM_HDH, B2_DIM_D}},
    {LAYER "self_attn.k_proj.weight", LAYER_AT(k_weight), B2_MATRIX, {B2_DIM_KDH, B2_DIM_D}},
    {LAYER "self_attn.v_proj.weight", LAYER_AT(v_weight), B2_MATRIX, {B2_DIM_KDH, B2_DIM_D}},
    {LAYER "self_attn.o_proj.weight", LAYER_AT(o_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_HDH}},
    {LAYER "post_attention_layernorm.weight", LAYER_AT(post_norm), B2_VECTOR, {B2_DIM_D}},
    {LAYER "mlp.gate_proj.weight", LAYER_AT(gate_weight), B2_MATRIX, {B2_DIM_F, B2_DIM_D}},
    {LAYER "mlp.up_proj.weight", LAYER_AT(up_weight), B2_MATRIX, {B2_DIM_F, B2_DIM_D}},
    {LAYER "mlp.down_proj.weight", LAYER_AT(down_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_F}},
};
static const b2_weight_row qkv_bias_table[] = {
    {LAYER "self_attn.q_proj.bias", LAYER_AT(q_bias), B2_VECTOR, {B2_DIM_HDH}},
    {LAYER "self_attn.k_proj.bias", LAYER_AT(k_bias), B2_VECTOR, {B2_DIM_KDH}},
    {LAYER "self_attn.v_proj.bias", LAYER_AT(v_bias), B2_VECTOR, {B2_DIM_KDH}},
};
static const b2_weight_row o_bias_table[] = {
    {LAYER "self_attn.o_proj.bias", LAYER_AT(o_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row mlp_bias_table[] = {
    {LAYER "mlp.gate_proj.bias", LAYER_AT(gate_bias), B2_VECTOR, {B2_DIM_F}},
    {LAYER "mlp.up_proj.bias", LAYER_AT(up_bias), B2_VECTOR, {B2_DIM_F}},
    {LAYER "mlp.down_proj.bias", LAYER_AT(down_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row qk_norm_table[] = {
    {LAYER "self_attn.q_norm.weight", LAYER_AT(q_norm), B2_VECTOR, {B2_DIM_DH}},
    {LAYER "self_attn.k_norm.weight", LAYER_AT(k_norm), B2_VECTOR, {B2_DIM_DH}},
};
/* Each table, and whether a config has it. */
static const struct {
    const b2_weight_row *rows;
    size_t count;
    size_t flag; /* offset of an int in b2_lm_config; 0: always */
} layer_tables[] = {
    {layer_table, COUNT(layer_table), 0},
    {qkv_bias_table, COUNT(qkv_bias_table), offsetof(b2_lm_config, qkv_bias)},
    {o_bias_table, COUNT(o_bias_table), offsetof(b2_lm_config, o_bias)},
    {mlp_bias_table, COUNT(mlp_bias_table), offsetof(b2_lm_config, mlp_bias)},
    {qk_norm_table, COUNT(qk_norm_table), offsetof(b2_lm_config, qk_norm)},
};

static int has_table(const b2_lm_config *c, size_t table)
{
    size_t flag = layer_tables[table].flag;
    return flag == 0 || *(const int *)(const void *)((const char *)c + flag);
}

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_lm_config *c)
{
    dims[B2_DIM_D] = c->hidden_size;
    dims[B2_DIM_F] = c->ffn_dim;
    dims[B2_DIM_V] = c->vocab_size;
    dims[B2_DIM_DH] = c->head_dim;
    dims[B2_DIM_HDH] = (int64_t)c->num_attention_heads * c->head_dim;
    dims[B2_DIM_KDH] = (int64_t)c->num_key_value_heads * c->head_dim;
}

static int bind_layer(llama *m, int i, b2_binder *binder, b2_err *err)
{
    binder->layer = i;
    for (size_t t = 0; t < COUNT(layer_tables); t++)
        if (has_table(&m->base.config, t) &&
            b2_bind(binder, &m->layers[i], layer_tables[t].rows, layer_tables[t].count, err) < 0)
            return -1;
    return 0;
}

static int llama_bind(b2_lm *lm, b2_binder *binder, b2_err *err)
{
    llama *m = (llama *)lm;
    const b2_lm_config *c = &lm->config;
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, c);
    binder->dims = dims;
    lm->kv_layers = c->num_hidden_layers;
    lm->kv_width = dims[B2_DIM_KDH];
    m->layers = b2_alloc_zeroed((size_t)c->num_hidden_layers, sizeof *m->layers, "language model layers", err);
    if (!m->layers || b2_bind_vocabulary(binder, m, &tokens_row, &head_row, c->tie_word_embeddings, err) < 0 ||
        b2_bind(binder, m, &norm_row, 1, err) < 0)
        return -1;
    for (int i = 0; i < c->num_hidden_layers; i++)
        if (bind_layer(m, i, binder, err) < 0)
            return -1;
    return 0;
}

static int llama_visit(const b2_lm *lm, b2_weight_visitor *visitor, b2_err *err)
{
    const llama *m = (const llama *)lm;
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, &lm->config);
    if (b2_visit_weights(visitor, m, &tokens_row, 1, dims, err) < 0 ||
        b2_visit_weights(visitor, m, &head_row, 1, dims, err) < 0 ||
        b2_visit_weights(visitor, m, &norm_row, 1, dims, err) < 0)
        return -1;
    for (int i = 0; i < lm->config.num_hidden_layers; i++)
        for (size_t t = 0; t < COUNT(layer_tables); t++)
            if (b2_visit_weights(visitor, &m->layers[i], layer_tables[t].rows, layer_tables[t].count, dims, err) < 0)
                return -1;
    return 0;
}

static void llama_release(b2_lm *lm)
{
    llama *m = (llama *)lm;
    b2_release_weights(m, &tokens_row, 1);
    b2_release_weights(m, &head_row, 1);
    b2_release_weights(m, &norm_row, 1);
    for (int i = 0; m->layers && i < lm->config.num_hidden_layers; i++)
        for (size_t t = 0; t < COUNT(layer_tables); t++)
            b2_release_weights(&m->layers[i], layer_tables[t].rows, layer_tables[t].count);
    b2_free(m->layers);
    m->layers = NULL;
}

/* The buffers of one forward pass, all of them from the arena. */
typedef struct buffers {
    b2_tensor h;        /* [N, D] */
    b2_tensor q;        /* [N, H*Dh] */
    b2_tensor attended; /* [N, H*Dh] */
    b2_tensor k, v;     /* [N, Hkv*Dh] */
    b2_tensor gate, up; /* [N, F] */
} buffers;

static size_t llama_scratch(const b2_ctx *ctx, const b2_lm *lm, int64_t tokens, int64_t keys, int64_t logits)
{
    const b2_lm_config *c = &lm->config;
    int64_t heads = (int64_t)c->num_attention_heads * c->head_dim;
    int64_t widest = b2_max64(b2_max64(b2_max64(c->hidden_size, c->ffn_dim), c->vocab_size), heads);
    return b2_arena_cost((size_t)(tokens * c->hidden_size), sizeof(float)) +
           2 * b2_arena_cost((size_t)(tokens * heads), sizeof(float)) +
           2 * b2_arena_cost((size_t)(tokens * lm->kv_width), sizeof(float)) +
           2 * b2_arena_cost((size_t)(tokens * c->ffn_dim), sizeof(float)) +
           b2_arena_cost((size_t)(logits * c->hidden_size), sizeof(float)) +
           b2_scratch_bytes(ctx, b2_max64(tokens, logits), widest, keys, c->head_dim);
}

static int take_buffers(b2_ctx *ctx, buffers *w, const b2_lm *lm, int64_t tokens, b2_err *err)
{
    const b2_lm_config *c = &lm->config;
    int64_t heads = (int64_t)c->num_attention_heads * c->head_dim;
    return b2_stage_take(ctx, &w->h, tokens, c->hidden_size, err) < 0 ||
                   b2_stage_take(ctx, &w->q, tokens, heads, err) < 0 ||
                   b2_stage_take(ctx, &w->attended, tokens, heads, err) < 0 ||
                   b2_stage_take(ctx, &w->k, tokens, lm->kv_width, err) < 0 ||
                   b2_stage_take(ctx, &w->v, tokens, lm->kv_width, err) < 0 ||
                   b2_stage_take(ctx, &w->gate, tokens, c->ffn_dim, err) < 0 ||
                   b2_stage_take(ctx, &w->up, tokens, c->ffn_dim, err) < 0
               ? -1
               : 0;
}

static int llama_embed(b2_ctx *ctx, const b2_lm *lm, b2_tensor out, const int32_t *ids, b2_err *err)
{
    return b2_embedding(ctx, out, &((const llama *)lm)->embed_tokens, ids, 0, 0, err);
}

/* x [N, heads*Dh]: each head's norm (where the model has one), then its place in the sequence. */
static int place(b2_ctx *ctx, const b2_lm_config *c, b2_tensor x, const b2_weight *norm, const int32_t *positions,
                 b2_err *err)
{
    b2_tensor heads = b2_tensor_of(x.data, x.rows * x.cols / c->head_dim, c->head_dim);
    if (norm->data && b2_rms_norm(ctx, heads, heads, norm, c->norm_eps, err) < 0)
        return -1;
    return b2_rope(ctx, x, positions, c->inv_freq, c->head_dim, c->head_dim, c->rope_scaling, err);
}

/* w->q, and this call's keys and values in the cache. */
static int project(b2_ctx *ctx, const b2_lm_config *c, const llama_layer *layer, int i, b2_lm_batch *batch, buffers *w,
                   b2_err *err)
{
    b2_linear_opts q = {.bias = &layer->q_bias}, k = {.bias = &layer->k_bias}, v = {.bias = &layer->v_bias};
    if (b2_linear(ctx, w->q, w->h, &layer->q_weight, &q, err) < 0 ||
        b2_linear(ctx, w->k, w->h, &layer->k_weight, &k, err) < 0 ||
        b2_linear(ctx, w->v, w->h, &layer->v_weight, &v, err) < 0 ||
        place(ctx, c, w->q, &layer->q_norm, batch->positions, err) < 0 ||
        place(ctx, c, w->k, &layer->k_norm, batch->positions, err) < 0)
        return -1;
    return b2_lm_store(ctx, batch, i, w->k, w->v, err);
}

static int self_attention(b2_ctx *ctx, const llama *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const b2_lm_config *c = &m->base.config;
    const llama_layer *layer = &m->layers[i];
    b2_linear_opts out = {.bias = &layer->o_bias, .residual = batch->x};
    b2_attention_args args = b2_lm_attention(batch, i, w->attended, w->q);
    args.heads = c->num_attention_heads;
    args.kv_heads = c->num_key_value_heads;
    args.head_dim = c->head_dim;
    args.scale = 1.0f / sqrtf((float)c->head_dim);
    args.window = c->slides[i] ? c->sliding_window : 0;
    if (b2_rms_norm(ctx, w->h, batch->x, &layer->input_norm, c->norm_eps, err) < 0 ||
        project(ctx, c, layer, i, batch, w, err) < 0 || b2_stage_attend(ctx, "language_model", i, &args, err) < 0)
        return -1;
    return b2_linear(ctx, batch->x, w->attended, &layer->o_weight, &out, err);
}

static int feed_forward(b2_ctx *ctx, const llama *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const b2_lm_config *c = &m->base.config;
    const llama_layer *layer = &m->layers[i];
    b2_linear_opts gate = {.bias = &layer->gate_bias}, up = {.bias = &layer->up_bias};
    b2_linear_opts down = {.bias = &layer->down_bias, .residual = batch->x};
    if (b2_rms_norm(ctx, w->h, batch->x, &layer->post_norm, c->norm_eps, err) < 0 ||
        b2_linear(ctx, w->gate, w->h, &layer->gate_weight, &gate, err) < 0 ||
        b2_linear(ctx, w->up, w->h, &layer->up_weight, &up, err) < 0 ||
        b2_gate(ctx, w->gate, w->gate, w->up, c->act, err) < 0)
        return -1;
    return b2_linear(ctx, batch->x, w->gate, &layer->down_weight, &down, err);
}

/* The last hidden states of every token, not only of those whose logits are wanted, for whoever watches. */
static int show_last(b2_ctx *ctx, const llama *m, b2_lm_batch *batch, const buffers *w, b2_err *err)
{
    if (!ctx->tap)
        return 0;
    if (b2_rms_norm(ctx, w->h, batch->x, &m->norm, m->base.config.norm_eps, err) < 0)
        return -1;
    return b2_stage_tap(ctx, "language_model", m->base.config.num_hidden_layers + 1, w->h, err);
}

static int head(b2_ctx *ctx, const llama *m, b2_lm_batch *batch, b2_err *err)
{
    const b2_weight *weight = m->lm_head.data ? &m->lm_head : &m->embed_tokens;
    b2_tensor last;
    if (batch->logits.rows == 0)
        return 0;
    if (b2_stage_take(ctx, &last, batch->logits.rows, batch->x.cols, err) < 0 ||
        b2_copy_rows(ctx, last, NULL, batch->x, batch->logit_rows, last.rows, err) < 0 ||
        b2_rms_norm(ctx, last, last, &m->norm, m->base.config.norm_eps, err) < 0)
        return -1;
    return b2_lm_head(ctx, batch, last, weight, err);
}

static int llama_forward(b2_ctx *ctx, const b2_lm *lm, b2_lm_batch *batch, b2_err *err)
{
    const llama *m = (const llama *)lm;
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    buffers w;
    if (take_buffers(ctx, &w, lm, batch->x.rows, err) < 0 ||
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

const b2_lm_class b2_llama_class = {
    .size = sizeof(llama),
    .forward_counts_pads = 1,
    .bind = llama_bind,
    .visit = llama_visit,
    .release = llama_release,
    .scratch = llama_scratch,
    .embed = llama_embed,
    .forward = llama_forward,
};
