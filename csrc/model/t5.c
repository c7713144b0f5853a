/* T5 and Flan-T5 (transformers' T5ForConditionalGeneration): an encoder-decoder without positions, but with a bias of
 * relative distances on every score of self-attention, the same in all layers of a stack.
 *
 *     encoder:  x += o(attention(RMS(x)));                    x += ff(RMS(x))     for every layer;  e = RMS(x)
 *     decoder:  x += o(causal attention(RMS(x)));
 *               x += o(attention(RMS(x) over k(e), v(e)));    x += ff(RMS(x))     for every layer
 *     ff(h) = wo(act(wi_0(h)) * wi_1(h)), or wo(act(wi(h)))
 *     logits = RMS(x) [* D^-0.5] . lm_head^T
 *
 * Scores are not scaled; heads need not fill the width. In half precision upstream, wo's products leave the range of
 * float16; here sums are float32 whatever the weights are stored as. */
#include "model/t5.h"

#include <math.h>
#include <stddef.h>

#include "core/memory.h"
#include "model/lm.h"
#include "model/stage.h"
#include "ops/weights.h"

typedef struct t5_layer {
    b2_weight attention_norm;                     /* [D] */
    b2_weight q, k, v, o;                         /* [HDh, D] x 3, [D, HDh] */
    b2_weight cross_norm;                         /* [D]; this and the next row: in the decoder */
    b2_weight cross_q, cross_k, cross_v, cross_o; /* [HDh, D] x 3, [D, HDh] */
    b2_weight ff_norm;                            /* [D] */
    b2_weight wi_0, wi_1;                         /* [F, D]; without a gate wi_0 is wi, and wi_1 absent */
    b2_weight wo;                                 /* [D, F] */
} t5_layer;

typedef struct t5_stack {
    t5_layer *layers;        /* [count], owned */
    int count;
    b2_weight relative_bias; /* [R, H], of all layers */
    float *distance_bias;    /* [H, 2L - 1], owned: the same by distance */
    b2_weight final_norm;    /* [D] */
} t5_stack;

typedef struct t5 {
    b2_lm base;
    b2_weight shared;    /* [V, D]: embedding of prompts and of decoder ids */
    b2_weight lm_head;   /* [V, D]; absent where the file has none of its own */
    b2_weight head_norm; /* [D]: the decoder's final norm * D^-0.5; absent where the head reads it as it is */
    t5_stack encoder, decoder;
} t5;

#define AT(field) offsetof(t5, field)
#define STACK_AT(field) offsetof(t5_stack, field)
#define LAYER_AT(field) offsetof(t5_layer, field)
#define COUNT(table) (sizeof(table) / sizeof *(table))
#define LM "language_model."

#define INTO_HEADS(name, field) {name, LAYER_AT(field), B2_MATRIX, {B2_DIM_HDH, B2_DIM_D}}
#define OUT_OF_HEADS(name, field) {name, LAYER_AT(field), B2_MATRIX, {B2_DIM_D, B2_DIM_HDH}}
#define NORM(name, field) {name, LAYER_AT(field), B2_VECTOR, {B2_DIM_D}}

#define SELF_ROWS(at)                                     \
    NORM(at "layer.0.layer_norm.weight", attention_norm), \
    INTO_HEADS(at "layer.0.SelfAttention.q.weight", q),   \
    INTO_HEADS(at "layer.0.SelfAttention.k.weight", k),   \
    INTO_HEADS(at "layer.0.SelfAttention.v.weight", v),   \
    OUT_OF_HEADS(at "layer.0.SelfAttention.o.weight", o)

#define FF_ROWS(at)                                                                               \
    NORM(at "layer_norm.weight", ff_norm),                                                        \
    {at "DenseReluDense.wo.weight", LAYER_AT(wo), B2_MATRIX, {B2_DIM_D, B2_DIM_F}}

#define GATED_ROWS(at)                                                                            \
    {at "DenseReluDense.wi_0.weight", LAYER_AT(wi_0), B2_MATRIX, {B2_DIM_F, B2_DIM_D}},           \
    {at "DenseReluDense.wi_1.weight", LAYER_AT(wi_1), B2_MATRIX, {B2_DIM_F, B2_DIM_D}}

#define PLAIN_ROWS(at) {at "DenseReluDense.wi.weight", LAYER_AT(wi_0), B2_MATRIX, {B2_DIM_F, B2_DIM_D}}

#define ENCODER_BLOCK LM "encoder.block.%d."
#define DECODER_BLOCK LM "decoder.block.%d."

static const b2_weight_row encoder_layer_table[] = {
    SELF_ROWS(ENCODER_BLOCK),
    FF_ROWS(ENCODER_BLOCK "layer.1."),
};
static const b2_weight_row decoder_layer_table[] = {
    SELF_ROWS(DECODER_BLOCK),
    NORM(DECODER_BLOCK "layer.1.layer_norm.weight", cross_norm),
    INTO_HEADS(DECODER_BLOCK "layer.1.EncDecAttention.q.weight", cross_q),
    INTO_HEADS(DECODER_BLOCK "layer.1.EncDecAttention.k.weight", cross_k),
    INTO_HEADS(DECODER_BLOCK "layer.1.EncDecAttention.v.weight", cross_v),
    OUT_OF_HEADS(DECODER_BLOCK "layer.1.EncDecAttention.o.weight", cross_o),
    FF_ROWS(DECODER_BLOCK "layer.2."),
};
static const b2_weight_row encoder_gated_table[] = {GATED_ROWS(ENCODER_BLOCK "layer.1.")};
static const b2_weight_row decoder_gated_table[] = {GATED_ROWS(DECODER_BLOCK "layer.2.")};
static const b2_weight_row encoder_plain_table[] = {PLAIN_ROWS(ENCODER_BLOCK "layer.1.")};
static const b2_weight_row decoder_plain_table[] = {PLAIN_ROWS(DECODER_BLOCK "layer.2.")};

#define STACK_ROWS(stack)                                                                                            \
    {LM stack ".block.0.layer.0.SelfAttention.relative_attention_bias.weight", STACK_AT(relative_bias), B2_TABLE,     \
     {B2_DIM_R, B2_DIM_H}},                                                                                          \
    {LM stack ".final_layer_norm.weight", STACK_AT(final_norm), B2_VECTOR, {B2_DIM_D}}

static const b2_weight_row encoder_table[] = {STACK_ROWS("encoder")};
static const b2_weight_row decoder_table[] = {STACK_ROWS("decoder")};

/* The token table under each name that files have it by. */
#define VOCABULARY(name, field) {LM name, AT(field), B2_VOCABULARY, {B2_DIM_V, B2_DIM_D}}
enum { SHARED, ENCODER_TOKENS, DECODER_TOKENS, HEAD, TOKEN_NAMES };
static const b2_weight_row token_rows[TOKEN_NAMES] = {
    VOCABULARY("shared.weight", shared),
    VOCABULARY("encoder.embed_tokens.weight", shared),
    VOCABULARY("decoder.embed_tokens.weight", shared),
    VOCABULARY("lm_head.weight", shared),
};
static const b2_weight_row head_row = VOCABULARY("lm_head.weight", lm_head);

/* The rows of one stack. */
typedef struct stack_tables {
    const b2_weight_row *stack, *layer, *gated, *plain;
    size_t stack_count, layer_count, gated_count, plain_count;
} stack_tables;

#define TABLES(side)                                                                                                 \
    {side##_table, side##_layer_table, side##_gated_table, side##_plain_table, COUNT(side##_table),                   \
     COUNT(side##_layer_table), COUNT(side##_gated_table), COUNT(side##_plain_table)}

static const stack_tables encoder_tables = TABLES(encoder), decoder_tables = TABLES(decoder);

static int64_t heads_width(const b2_lm_config *c)
{
    return (int64_t)c->num_attention_heads * c->head_dim;
}

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_lm_config *c)
{
    dims[B2_DIM_D] = c->hidden_size;
    dims[B2_DIM_F] = c->ffn_dim;
    dims[B2_DIM_V] = c->vocab_size;
    dims[B2_DIM_H] = c->num_attention_heads;
    dims[B2_DIM_HDH] = heads_width(c);
    dims[B2_DIM_R] = c->relative_attention_num_buckets;
}

/* ---- distances ---- */

/* In float32 as torch computes it: at powers of two the logarithm meets the edge of a bucket exactly. */
static int bucket_of(int64_t distance, int buckets, int64_t max_distance, int bidirectional)
{
    int first = 0;
    if (bidirectional) {
        buckets /= 2;
        first = distance > 0 ? buckets : 0;
        distance = distance < 0 ? -distance : distance;
    } else {
        distance = distance < 0 ? -distance : 0;
    }
    int exact = buckets / 2;
    if (distance < exact)
        return first + (int)distance;
    float steps = (float)log((double)((float)distance / (float)exact));
    float most = (float)log((double)max_distance / exact);
    int bucket = exact + (int)(steps / most * (float)(buckets - exact));
    return first + (bucket < buckets - 1 ? bucket : buckets - 1);
}

void b2_t5_distance_bias(float *out, const float *table, int buckets, int heads, int64_t max_distance,
                         int bidirectional)
{
    int64_t width = 2 * max_distance + 1;
    for (int64_t d = -max_distance; d <= max_distance; d++) {
        const float *row = table + (int64_t)bucket_of(d, buckets, max_distance, bidirectional) * heads;
        for (int h = 0; h < heads; h++)
            out[h * width + d + max_distance] = row[h];
    }
}

static int make_distance_bias(t5_stack *stack, const b2_lm_config *c, int bidirectional, b2_err *err)
{
    size_t width = 2 * (size_t)c->relative_attention_max_distance + 1;
    stack->distance_bias = b2_alloc(width * (size_t)c->num_attention_heads, sizeof(float), "T5 position bias", err);
    if (!stack->distance_bias)
        return -1;
    b2_t5_distance_bias(stack->distance_bias, stack->relative_bias.data, c->relative_attention_num_buckets,
                        c->num_attention_heads, c->relative_attention_max_distance, bidirectional);
    return 0;
}

/* ---- weights ---- */

/* transformers ties all four names to the first that the file holds; another one is its own where its values differ. The
 * encoder's is not looked at: BLIP-2 embeds prompts with `shared`. */
static int bind_tokens(t5 *m, b2_binder *binder, b2_err *err)
{
    int first = 0;
    while (first < TOKEN_NAMES && !b2_checkpoint_find(binder->checkpoint, token_rows[first].name))
        first++;
    if (first == TOKEN_NAMES)
        return b2_fail(err, B2_E_FORMAT, "%s: missing from the checkpoint", token_rows[SHARED].name);
    if (b2_bind(binder, m, &token_rows[first], 1, err) < 0)
        return -1;
    for (int i = first + 1; i < TOKEN_NAMES; i++) {
        const b2_weight_row *row = &token_rows[i];
        if (!b2_checkpoint_find(binder->checkpoint, row->name))
            continue;
        int own = i != ENCODER_TOKENS && !b2_binder_same(binder, row->name, token_rows[first].name);
        if (own && i == DECODER_TOKENS)
            return b2_fail(err, B2_E_UNSUPPORTED, "%s: differs from %s; one table for both is what is computed",
                           row->name, token_rows[first].name);
        if (own && b2_bind(binder, m, &head_row, 1, err) < 0)
            return -1;
        b2_binder_ignore(binder, row->name); /* a copy of the table: known, not unexpected */
    }
    return 0;
}

static int bind_stack(t5_stack *stack, int count, const stack_tables *tables, const b2_lm_config *c, b2_binder *binder,
                      b2_err *err)
{
    stack->layers = b2_alloc_zeroed((size_t)count, sizeof *stack->layers, "T5 layers", err);
    if (!stack->layers || b2_bind(binder, stack, tables->stack, tables->stack_count, err) < 0 ||
        make_distance_bias(stack, c, tables == &encoder_tables, err) < 0)
        return -1;
    stack->count = count;
    for (int i = 0; i < count; i++) {
        binder->layer = i;
        if (b2_bind(binder, &stack->layers[i], tables->layer, tables->layer_count, err) < 0 ||
            b2_bind(binder, &stack->layers[i], c->is_gated_act ? tables->gated : tables->plain,
                    c->is_gated_act ? tables->gated_count : tables->plain_count, err) < 0)
            return -1;
    }
    return 0;
}

static int make_head_norm(t5 *m, b2_err *err)
{
    if (!m->base.config.scale_decoder_outputs)
        return 0;
    if (b2_weight_copy(&m->head_norm, &m->decoder.final_norm, B2_F32, err) < 0)
        return -1;
    float *values = (float *)m->head_norm.data, scale = 1.0f / sqrtf((float)m->base.config.hidden_size);
    for (int64_t i = 0; i < m->head_norm.n; i++)
        values[i] *= scale;
    return 0;
}

static int t5_bind(b2_lm *lm, b2_binder *binder, b2_err *err)
{
    t5 *m = (t5 *)lm;
    const b2_lm_config *c = &lm->config;
    int64_t dims[B2_DIM_COUNT] = {0};
    fill_dims(dims, c);
    binder->dims = dims;
    lm->kv_layers = c->num_decoder_layers;
    lm->kv_width = heads_width(c);
    b2_binder_ignore(binder, LM "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight");
    return bind_tokens(m, binder, err) < 0 ||
                   bind_stack(&m->encoder, c->num_hidden_layers, &encoder_tables, c, binder, err) < 0 ||
                   bind_stack(&m->decoder, c->num_decoder_layers, &decoder_tables, c, binder, err) < 0 ||
                   make_head_norm(m, err) < 0
               ? -1
               : 0;
}

static int visit_stack(const t5_stack *stack, const stack_tables *tables, int gated, b2_weight_visitor *visitor,
                       const int64_t *dims, b2_err *err)
{
    if (b2_visit_weights(visitor, stack, tables->stack, tables->stack_count, dims, err) < 0)
        return -1;
    for (int i = 0; i < stack->count; i++)
        if (b2_visit_weights(visitor, &stack->layers[i], tables->layer, tables->layer_count, dims, err) < 0 ||
            b2_visit_weights(visitor, &stack->layers[i], gated ? tables->gated : tables->plain,
                             gated ? tables->gated_count : tables->plain_count, dims, err) < 0)
            return -1;
    return 0;
}

static int t5_visit(const b2_lm *lm, b2_weight_visitor *visitor, b2_err *err)
{
    const t5 *m = (const t5 *)lm;
    int64_t dims[B2_DIM_COUNT] = {0};
    int gated = lm->config.is_gated_act;
    fill_dims(dims, &lm->config);
    return b2_visit_weights(visitor, m, &token_rows[SHARED], 1, dims, err) < 0 ||
                   b2_visit_weights(visitor, m, &head_row, 1, dims, err) < 0 ||
                   visit_stack(&m->encoder, &encoder_tables, gated, visitor, dims, err) < 0 ||
                   visit_stack(&m->decoder, &decoder_tables, gated, visitor, dims, err) < 0
               ? -1
               : 0;
}

static int t5_visit_made(const b2_lm *lm, b2_weight_visitor *visitor, b2_err *err)
{
    const b2_weight *norm = &((const t5 *)lm)->head_norm;
    return norm->data ? visitor->fn(visitor, norm, &norm->n, 1, err) : 0;
}

/* A stack whose binding failed half-way has layers without a count. */
static void release_stack(t5_stack *stack, int count, const stack_tables *tables)
{
    b2_release_weights(stack, tables->stack, tables->stack_count);
    for (int i = 0; stack->layers && i < count; i++) {
        b2_release_weights(&stack->layers[i], tables->layer, tables->layer_count);
        b2_release_weights(&stack->layers[i], tables->gated, tables->gated_count);
    }
    b2_free(stack->layers);
    b2_free(stack->distance_bias);
    *stack = (t5_stack){0};
}

static void t5_release(b2_lm *lm)
{
    t5 *m = (t5 *)lm;
    b2_weight_release(&m->shared);
    b2_weight_release(&m->lm_head);
    b2_weight_release(&m->head_norm);
    release_stack(&m->encoder, lm->config.num_hidden_layers, &encoder_tables);
    release_stack(&m->decoder, lm->config.num_decoder_layers, &decoder_tables);
}

/* ---- scratch ---- */

/* The buffers of one pass, all of them from the arena. */
typedef struct buffers {
    b2_tensor h;       /* [N, D] */
    b2_tensor q, k, v; /* [N, HDh] */
    b2_tensor mixed;   /* [N, HDh]: what attention gives */
    b2_tensor inner;   /* [N, F] */
    b2_tensor up;      /* [N, F], with a gate */
} buffers;

static int take_buffers(b2_ctx *ctx, buffers *w, const b2_lm_config *c, int64_t tokens, b2_err *err)
{
    *w = (buffers){0};
    return b2_stage_take(ctx, &w->h, tokens, c->hidden_size, err) < 0 ||
                   b2_stage_take(ctx, &w->q, tokens, heads_width(c), err) < 0 ||
                   b2_stage_take(ctx, &w->k, tokens, heads_width(c), err) < 0 ||
                   b2_stage_take(ctx, &w->v, tokens, heads_width(c), err) < 0 ||
                   b2_stage_take(ctx, &w->mixed, tokens, heads_width(c), err) < 0 ||
                   b2_stage_take(ctx, &w->inner, tokens, c->ffn_dim, err) < 0 ||
                   (c->is_gated_act && b2_stage_take(ctx, &w->up, tokens, c->ffn_dim, err) < 0)
               ? -1
               : 0;
}

static size_t buffers_scratch(const b2_lm_config *c, int64_t tokens)
{
    return b2_arena_cost((size_t)(tokens * c->hidden_size), sizeof(float)) +
           4 * b2_arena_cost((size_t)(tokens * heads_width(c)), sizeof(float)) +
           2 * b2_arena_cost((size_t)(tokens * c->ffn_dim), sizeof(float));
}

static int64_t widest(const b2_lm_config *c)
{
    return b2_max64(b2_max64(c->hidden_size, c->ffn_dim), b2_max64(heads_width(c), c->vocab_size));
}

static size_t t5_scratch(const b2_ctx *ctx, const b2_lm *lm, int64_t tokens, int64_t keys, int64_t logits)
{
    const b2_lm_config *c = &lm->config;
    return buffers_scratch(c, tokens) + b2_arena_cost((size_t)(logits * c->hidden_size), sizeof(float)) +
           b2_scratch_bytes(ctx, b2_max64(tokens, logits), widest(c), keys, c->head_dim);
}

/* Rows are at most as many as tokens. */
static size_t t5_encode_scratch(const b2_ctx *ctx, const b2_lm *lm, int64_t tokens, int64_t longest_row)
{
    const b2_lm_config *c = &lm->config;
    return buffers_scratch(c, tokens) + b2_arena_cost((size_t)tokens, sizeof(int32_t)) +
           b2_scratch_bytes(ctx, tokens, widest(c), longest_row, c->head_dim);
}

/* ---- forward ---- */

static int t5_embed(b2_ctx *ctx, const b2_lm *lm, b2_tensor out, const int32_t *ids, b2_err *err)
{
    return b2_embedding(ctx, out, &((const t5 *)lm)->shared, ids, 0, 0, err);
}

static int project(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, b2_err *err)
{
    b2_linear_opts opts = {0};
    return b2_linear(ctx, out, x, w, &opts, err);
}

/* x += w . h */
static int project_onto(b2_ctx *ctx, b2_tensor x, b2_tensor h, const b2_weight *w, b2_err *err)
{
    b2_linear_opts opts = {.residual = x};
    return b2_linear(ctx, x, h, w, &opts, err);
}

/* w->h = RMS(x); w->q, w->k, w->v of it. */
static int project_self(b2_ctx *ctx, const t5 *m, const t5_layer *layer, b2_tensor x, buffers *w, b2_err *err)
{
    return b2_rms_norm(ctx, w->h, x, &layer->attention_norm, m->base.config.norm_eps, err) < 0 ||
                   project(ctx, w->q, w->h, &layer->q, err) < 0 || project(ctx, w->k, w->h, &layer->k, err) < 0 ||
                   project(ctx, w->v, w->h, &layer->v, err) < 0
               ? -1
               : 0;
}

/* What all three attentions have in common. */
static b2_attention_args attention_over(const b2_lm_config *c, const b2_lm_batch *batch, const buffers *w, b2_tensor keys,
                                        b2_tensor values)
{
    return (b2_attention_args){.out = w->mixed,
                               .q = w->q,
                               .rows = batch->rows,
                               .q_offsets = batch->q_offsets,
                               .k = keys,
                               .v = values,
                               .heads = c->num_attention_heads,
                               .kv_heads = c->num_attention_heads,
                               .head_dim = c->head_dim,
                               .scale = 1.0f};
}

static void use_distances(b2_attention_args *args, const t5_stack *stack, const b2_lm_config *c)
{
    args->distance_bias = stack->distance_bias;
    args->distance_limit = c->relative_attention_max_distance + 1;
}

static int feed_forward(b2_ctx *ctx, const t5 *m, const t5_layer *layer, b2_tensor x, buffers *w, b2_err *err)
{
    const b2_lm_config *c = &m->base.config;
    b2_linear_opts plain = {.act = c->act};
    if (b2_rms_norm(ctx, w->h, x, &layer->ff_norm, c->norm_eps, err) < 0)
        return -1;
    if (!c->is_gated_act) {
        if (b2_linear(ctx, w->inner, w->h, &layer->wi_0, &plain, err) < 0)
            return -1;
    } else if (project(ctx, w->inner, w->h, &layer->wi_0, err) < 0 || project(ctx, w->up, w->h, &layer->wi_1, err) < 0 ||
               b2_gate(ctx, w->inner, w->inner, w->up, c->act, err) < 0) {
        return -1;
    }
    return project_onto(ctx, x, w->inner, &layer->wo, err);
}

/* ---- the encoder ---- */

static int encoder_layer(b2_ctx *ctx, const t5 *m, int i, b2_lm_batch *batch, const int32_t *lens, buffers *w,
                         b2_err *err)
{
    const t5_layer *layer = &m->encoder.layers[i];
    if (project_self(ctx, m, layer, batch->x, w, err) < 0)
        return -1;
    b2_attention_args args = attention_over(&m->base.config, batch, w, w->k, w->v);
    args.prefix_starts = batch->q_offsets;
    args.prefix_lens = lens;
    args.key_mask = batch->key_mask;
    args.key_mask_ld = batch->key_mask_ld;
    use_distances(&args, &m->encoder, &m->base.config);
    return b2_stage_attend(ctx, "encoder", i, &args, err) < 0 ||
                   project_onto(ctx, batch->x, w->mixed, &layer->o, err) < 0 ||
                   feed_forward(ctx, m, layer, batch->x, w, err) < 0
               ? -1
               : 0;
}

/* What each decoder layer will read of the encoder, once for all steps. */
static int fill_cross_cache(b2_ctx *ctx, const t5 *m, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    for (int i = 0; i < m->decoder.count; i++) {
        const t5_layer *layer = &m->decoder.layers[i];
        if (project(ctx, w->k, batch->x, &layer->cross_k, err) < 0 ||
            project(ctx, w->v, batch->x, &layer->cross_v, err) < 0 ||
            b2_lm_store(ctx, batch, i, w->k, w->v, err) < 0)
            return -1;
    }
    return 0;
}

static int run_encoder(b2_ctx *ctx, const t5 *m, b2_lm_batch *batch, b2_err *err)
{
    const b2_lm_config *c = &m->base.config;
    buffers w;
    int32_t *lens = b2_arena_take(ctx->scratch, (size_t)batch->rows, sizeof *lens, err);
    if (!lens || take_buffers(ctx, &w, c, batch->x.rows, err) < 0 ||
        b2_stage_done(ctx, "encoder", 0, batch->x, err) < 0)
        return -1;
    for (int64_t b = 0; b < batch->rows; b++)
        lens[b] = batch->q_offsets[b + 1] - batch->q_offsets[b];
    for (int i = 0; i < m->encoder.count; i++)
        if (encoder_layer(ctx, m, i, batch, lens, &w, err) < 0 ||
            b2_stage_done(ctx, "encoder", i + 1, batch->x, err) < 0)
            return -1;
    if (b2_rms_norm(ctx, batch->x, batch->x, &m->encoder.final_norm, c->norm_eps, err) < 0 ||
        b2_stage_tap(ctx, "encoder", m->encoder.count + 1, batch->x, err) < 0)
        return -1;
    return fill_cross_cache(ctx, m, batch, &w, err);
}

static int t5_encode(b2_ctx *ctx, const b2_lm *lm, b2_lm_batch *batch, b2_err *err)
{
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    int status = run_encoder(ctx, (const t5 *)lm, batch, err);
    b2_ctx_reset(ctx, mark);
    return status;
}

/* ---- the decoder ---- */

static int self_attention(b2_ctx *ctx, const t5 *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const t5_layer *layer = &m->decoder.layers[i];
    if (project_self(ctx, m, layer, batch->x, w, err) < 0 || b2_lm_store(ctx, batch, i, w->k, w->v, err) < 0)
        return -1;
    b2_attention_args args = b2_lm_attention(batch, i, w->mixed, w->q);
    args.heads = args.kv_heads = m->base.config.num_attention_heads;
    args.head_dim = m->base.config.head_dim;
    args.scale = 1.0f;
    use_distances(&args, &m->decoder, &m->base.config);
    return b2_stage_attend(ctx, "decoder", i, &args, err) < 0 ||
                   project_onto(ctx, batch->x, w->mixed, &layer->o, err) < 0
               ? -1
               : 0;
}

static int cross_attention(b2_ctx *ctx, const t5 *m, int i, b2_lm_batch *batch, buffers *w, b2_err *err)
{
    const t5_layer *layer = &m->decoder.layers[i];
    if (b2_rms_norm(ctx, w->h, batch->x, &layer->cross_norm, m->base.config.norm_eps, err) < 0 ||
        project(ctx, w->q, w->h, &layer->cross_q, err) < 0)
        return -1;
    b2_attention_args args = attention_over(&m->base.config, batch, w, b2_kv_cache_keys(batch->cross, i),
                                            b2_kv_cache_values(batch->cross, i));
    args.keys = batch->cross->dtype;
    args.prefix_starts = batch->cross_starts;
    args.prefix_lens = batch->cross_lens;
    args.key_mask = batch->cross_mask;
    args.key_mask_ld = batch->cross_mask_ld;
    return b2_stage_attend(ctx, "decoder_cross", i, &args, err) < 0 ||
                   project_onto(ctx, batch->x, w->mixed, &layer->cross_o, err) < 0
               ? -1
               : 0;
}

/* last [.., D] = the norm of those tokens whose logits are wanted. */
static int norm_last(b2_ctx *ctx, const t5 *m, const b2_lm_batch *batch, b2_tensor last, const b2_weight *norm,
                     b2_err *err)
{
    return b2_copy_rows(ctx, last, NULL, batch->x, batch->logit_rows, last.rows, err) < 0 ||
                   b2_rms_norm(ctx, last, last, norm, m->base.config.norm_eps, err) < 0
               ? -1
               : 0;
}

/* The last hidden states of every token, not only of those whose logits are wanted, for whoever watches. The scaling is no
 * part of them. */
static int show_last(b2_ctx *ctx, const t5 *m, b2_lm_batch *batch, const buffers *w, b2_err *err)
{
    if (!ctx->tap)
        return 0;
    if (b2_rms_norm(ctx, w->h, batch->x, &m->decoder.final_norm, m->base.config.norm_eps, err) < 0)
        return -1;
    return b2_stage_tap(ctx, "decoder", m->decoder.count + 1, w->h, err);
}

static int head(b2_ctx *ctx, const t5 *m, b2_lm_batch *batch, b2_err *err)
{
    b2_tensor last;
    if (batch->logits.rows == 0)
        return 0;
    if (b2_stage_take(ctx, &last, batch->logits.rows, batch->x.cols, err) < 0 ||
        norm_last(ctx, m, batch, last, &m->decoder.final_norm, err) < 0 ||
        (m->head_norm.data && norm_last(ctx, m, batch, last, &m->head_norm, err) < 0))
        return -1;
    return b2_lm_head(ctx, batch, last, m->lm_head.data ? &m->lm_head : &m->shared, err);
}

static int run_decoder(b2_ctx *ctx, const t5 *m, b2_lm_batch *batch, b2_err *err)
{
    buffers w;
    if (take_buffers(ctx, &w, &m->base.config, batch->x.rows, err) < 0 ||
        b2_stage_done(ctx, "decoder", 0, batch->x, err) < 0)
        return -1;
    for (int i = 0; i < m->decoder.count; i++)
        if (self_attention(ctx, m, i, batch, &w, err) < 0 || cross_attention(ctx, m, i, batch, &w, err) < 0 ||
            feed_forward(ctx, m, &m->decoder.layers[i], batch->x, &w, err) < 0 ||
            b2_stage_done(ctx, "decoder", i + 1, batch->x, err) < 0)
            return -1;
    return show_last(ctx, m, batch, &w, err) < 0 ? -1 : head(ctx, m, batch, err);
}

static int t5_forward(b2_ctx *ctx, const b2_lm *lm, b2_lm_batch *batch, b2_err *err)
{
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    int status = run_decoder(ctx, (const t5 *)lm, batch, err);
    b2_ctx_reset(ctx, mark);
    return status;
}

const b2_lm_class b2_t5_class = {
    .size = sizeof(t5),
    .bind = t5_bind,
    .visit = t5_visit,
    .visit_made = t5_visit_made,
    .release = t5_release,
    .scratch = t5_scratch,
    .embed = t5_embed,
    .forward = t5_forward,
    .encode = t5_encode,
    .encode_scratch = t5_encode_scratch,
};
