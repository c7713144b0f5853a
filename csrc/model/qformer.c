#include "model/qformer.h"

#include <stddef.h>
#include <string.h>

#include "core/memory.h"
#include "model/stage.h"

#define AT(field) offsetof(b2_qformer, field)
#define LAYER_AT(field) offsetof(b2_qformer_layer, field)
#define COUNT(table) (sizeof(table) / sizeof *(table))

static const b2_weight_row queries_row = {"query_tokens", AT(query_tokens), B2_TABLE, {B2_DIM_1, B2_DIM_Q, B2_DIM_D}};
static const b2_weight_row top_table[] = {
    {"qformer.layernorm.weight", AT(norm_weight), B2_VECTOR, {B2_DIM_D}},
    {"qformer.layernorm.bias", AT(norm_bias), B2_VECTOR, {B2_DIM_D}},
};
/* InstructBLIP's, instead. */
static const b2_weight_row beside_table[] = {
    {"qformer.embeddings.word_embeddings.weight", AT(word_embeddings), B2_VOCABULARY, {B2_DIM_V, B2_DIM_D}},
    {"qformer.embeddings.position_embeddings.weight", AT(position_embeddings), B2_TABLE, {B2_DIM_T, B2_DIM_D}},
    {"qformer.embeddings.layernorm.weight", AT(norm_weight), B2_VECTOR, {B2_DIM_D}},
    {"qformer.embeddings.layernorm.bias", AT(norm_bias), B2_VECTOR, {B2_DIM_D}},
};

/* Retrieval's, instead: here the embeddings stand outside. */
static const b2_weight_row apart_table[] = {
    {"embeddings.word_embeddings.weight", AT(word_embeddings), B2_VOCABULARY, {B2_DIM_V, B2_DIM_D}},
    {"embeddings.position_embeddings.weight", AT(position_embeddings), B2_TABLE, {B2_DIM_T, B2_DIM_D}},
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
static const b2_weight_row text_table[] = {
    {LAYER "intermediate.dense.weight", LAYER_AT(text_intermediate_weight), B2_MATRIX, {B2_DIM_F, B2_DIM_D}},
    {LAYER "intermediate.dense.bias", LAYER_AT(text_intermediate_bias), B2_VECTOR, {B2_DIM_F}},
    {LAYER "output.dense.weight", LAYER_AT(text_output_weight), B2_MATRIX, {B2_DIM_D, B2_DIM_F}},
    {LAYER "output.dense.bias", LAYER_AT(text_output_bias), B2_VECTOR, {B2_DIM_D}},
    {LAYER "output.LayerNorm.weight", LAYER_AT(text_norm_weight), B2_VECTOR, {B2_DIM_D}},
    {LAYER "output.LayerNorm.bias", LAYER_AT(text_norm_bias), B2_VECTOR, {B2_DIM_D}},
};
static const b2_weight_row cross_table[] = {ATTENTION_ROWS("crossattention", cross_attention, B2_DIM_E)};

static int has_cross_attention(const b2_qformer_config *config, int layer)
{
    return layer % config->cross_attention_frequency == 0;
}

static const b2_weight_row *top_rows(const b2_qformer_config *config, size_t *count)
{
    static const struct {
        const b2_weight_row *rows;
        size_t count;
    } tables[] = {[B2_TEXT_NONE] = {top_table, COUNT(top_table)},
                  [B2_TEXT_BESIDE] = {beside_table, COUNT(beside_table)},
                  [B2_TEXT_APART] = {apart_table, COUNT(apart_table)}};
    *count = tables[config->text_side].count;
    return tables[config->text_side].rows;
}

static void fill_dims(int64_t dims[B2_DIM_COUNT], const b2_qformer_config *config)
{
    dims[B2_DIM_1] = 1;
    dims[B2_DIM_D] = config->hidden_size;
    dims[B2_DIM_F] = config->intermediate_size;
    dims[B2_DIM_E] = config->encoder_hidden_size;
    dims[B2_DIM_Q] = config->num_query_tokens;
    dims[B2_DIM_V] = config->vocab_size;
    dims[B2_DIM_T] = config->max_position_embeddings;
}

static int bind_layer(b2_qformer *qformer, int i, b2_binder *binder, b2_err *err)
{
    const b2_qformer_config *config = &qformer->config;
    b2_qformer_layer *layer = &qformer->layers[i];
    binder->layer = i;
    if (b2_bind(binder, layer, layer_table, COUNT(layer_table), err) < 0)
        return -1;
    if (has_cross_attention(config, i) && b2_bind(binder, layer, cross_table, COUNT(cross_table), err) < 0)
        return -1;
    return config->text_side ? b2_bind(binder, layer, text_table, COUNT(text_table), err) : 0;
}

int b2_qformer_bind(b2_qformer *qformer, const b2_qformer_config *config, b2_binder *binder, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    size_t count;
    const b2_weight_row *top = top_rows(config, &count);
    fill_dims(dims, config);
    binder->dims = dims;
    qformer->config = *config;
    b2_binder_ignore(binder, "qformer.embeddings.position_ids"); /* 0, 1, 2 ...: older files hold it */
    b2_binder_ignore(binder, "embeddings.position_ids");
    qformer->layers =
        b2_alloc_zeroed((size_t)config->num_hidden_layers, sizeof *qformer->layers, "Q-Former layers", err);
    if (!qformer->layers || b2_bind(binder, qformer, &queries_row, 1, err) < 0 ||
        b2_bind(binder, qformer, top, count, err) < 0)
        return -1;
    for (int i = 0; i < config->num_hidden_layers; i++)
        if (bind_layer(qformer, i, binder, err) < 0)
            return -1;
    return 0;
}

int b2_qformer_visit(const b2_qformer *qformer, b2_weight_visitor *visitor, b2_err *err)
{
    int64_t dims[B2_DIM_COUNT] = {0};
    size_t count;
    const b2_weight_row *top = top_rows(&qformer->config, &count);
    fill_dims(dims, &qformer->config);
    if (b2_visit_weights(visitor, qformer, &queries_row, 1, dims, err) < 0 ||
        b2_visit_weights(visitor, qformer, top, count, dims, err) < 0)
        return -1;
    for (int i = 0; i < qformer->config.num_hidden_layers; i++)
        if (b2_visit_weights(visitor, &qformer->layers[i], layer_table, COUNT(layer_table), dims, err) < 0 ||
            b2_visit_weights(visitor, &qformer->layers[i], cross_table, COUNT(cross_table), dims, err) < 0 ||
            b2_visit_weights(visitor, &qformer->layers[i], text_table, COUNT(text_table), dims, err) < 0)
            return -1;
    return 0;
}

void b2_qformer_release(b2_qformer *qformer)
{
    size_t count;
    const b2_weight_row *top = top_rows(&qformer->config, &count);
    b2_release_weights(qformer, &queries_row, 1);
    b2_release_weights(qformer, top, count);
    for (int i = 0; qformer->layers && i < qformer->config.num_hidden_layers; i++) {
        b2_release_weights(&qformer->layers[i], layer_table, COUNT(layer_table));
        b2_release_weights(&qformer->layers[i], cross_table, COUNT(cross_table));
        b2_release_weights(&qformer->layers[i], text_table, COUNT(text_table));
    }
    b2_free(qformer->layers);
    b2_memory_free(qformer->start_memory, qformer->start);
    qformer->layers = NULL;
    qformer->start = NULL;
}

int b2_texts_check(const b2_qformer_config *c, const b2_texts *texts, int64_t items, b2_err *err)
{
    if (texts ? c->text_side == B2_TEXT_NONE : c->text_side == B2_TEXT_BESIDE)
        return b2_fail(err, B2_E_VALUE, texts ? "this model's Q-Former reads no text, but texts were given"
                                              : "this model's Q-Former reads a text beside each picture (qformer_input_ids): "
                                                "none was given");
    for (int64_t b = 0; texts && b < items; b++) {
        int64_t first = texts->offsets[b] - texts->offsets[0], end = texts->offsets[b + 1] - texts->offsets[0];
        if (end < first || end - first > c->max_position_embeddings)
            return b2_fail(err, B2_E_VALUE, "text %lld has %lld tokens, the Q-Former has positions for %lld", (long long)b,
                           (long long)(end - first), (long long)c->max_position_embeddings);
        for (int64_t i = first; texts->ids && i < end; i++)
            if (texts->ids[i] < 0 || texts->ids[i] >= c->vocab_size)
                return b2_fail(err, B2_E_INDEX, "text %lld: token id %d is outside the Q-Former's vocabulary of %lld",
                               (long long)b, (int)texts->ids[i], (long long)c->vocab_size);
    }
    return 0;
}

size_t b2_qformer_scratch(const b2_ctx *ctx, const b2_qformer *qformer, int64_t items, int64_t queries, int64_t pictures,
                          int64_t image_tokens, int64_t longest_text)
{
    const b2_qformer_config *c = &qformer->config;
    int64_t of_all = items * queries, text = items * longest_text, rows = of_all + text;
    int64_t keys = b2_max64(pictures * image_tokens, rows);
    int64_t widest = b2_max64(b2_max64(c->hidden_size, c->intermediate_size), c->encoder_hidden_size);
    return 3 * b2_arena_cost((size_t)(rows * c->hidden_size), sizeof(float)) +
           b2_arena_cost((size_t)(b2_max64(of_all, text) * c->intermediate_size), sizeof(float)) +
           2 * b2_arena_cost((size_t)(keys * c->hidden_size), sizeof(float)) +
           3 * b2_stage_attention_scratch(items) + 2 * b2_arena_cost((size_t)items + 1, sizeof(int32_t)) +
           2 * b2_arena_cost((size_t)text, sizeof(int32_t)) + b2_arena_cost((size_t)rows, 1) +
           b2_scratch_bytes(ctx, b2_max64(rows, keys), widest, b2_max64(image_tokens, queries + longest_text),
                            (int)(c->hidden_size / c->num_attention_heads));
}

/* The buffers of one forward pass, all of them from the arena. Their rows are all queries, picture after picture, then all
 * texts. */
typedef struct buffers {
    b2_tensor x;     /* [B*Q + N, D] */
    b2_tensor q;     /* [B*Q + N, D] */
    b2_tensor h;     /* [B*Q + N, D] */
    b2_tensor inner; /* [max(B*Q, N), F] */
    float *k, *v;    /* [max(B*T, B*Q + N), D] */
    int64_t each;    /* Q */
    int64_t queries; /* B*Q */
    int64_t text;    /* N; 0 without texts */
    b2_stage_rows over_queries, over_image;
    b2_stage_rows text_alone; /* no queries: whom a text sees that sees its own only */
    b2_qformer_sees sees;
    int64_t image_tokens; /* T */
    const uint8_t *image_mask; /* [B, T] or NULL */
    uint8_t *key_mask;    /* [B, Q + longest] or NULL */
    /* Of texts. */
    int32_t *text_offsets;  /* [B+1] */
    int32_t *text_lens;     /* [B] */
    int32_t *slots;         /* [B, longest]: rows of x */
    int32_t *positions;     /* [N] */
    int64_t longest;
} buffers;

static int64_t longest_text(const b2_texts *texts, int64_t items)
{
    int64_t longest = 0;
    for (int64_t b = 0; texts && b < items; b++)
        longest = b2_max64(longest, texts->offsets[b + 1] - texts->offsets[b]);
    return longest;
}

static int take_text_tables(b2_ctx *ctx, buffers *w, const b2_qformer_in *in, b2_err *err)
{
    const b2_texts *texts = in->texts;
    w->text_offsets = b2_arena_take(ctx->scratch, (size_t)in->items + 1, sizeof(int32_t), err);
    w->text_lens = b2_arena_take(ctx->scratch, (size_t)in->items + 1, sizeof(int32_t), err);
    w->slots = b2_arena_take(ctx->scratch, (size_t)(in->items * w->longest), sizeof(int32_t), err);
    w->positions = b2_arena_take(ctx->scratch, (size_t)w->text, sizeof(int32_t), err);
    if (!w->text_offsets || !w->text_lens || !w->slots || !w->positions)
        return -1;
    w->text_offsets[0] = 0;
    for (int64_t b = 0; b < in->items; b++) {
        int64_t first = texts->offsets[b] - texts->offsets[0], length = texts->offsets[b + 1] - texts->offsets[b];
        w->text_offsets[b + 1] = (int32_t)(first + length);
        w->text_lens[b] = (int32_t)length;
        for (int64_t i = 0; i < length; i++) {
            w->slots[b * w->longest + i] = (int32_t)(w->queries + first + i);
            w->positions[first + i] = (int32_t)i;
        }
    }
    return 0;
}

/* Of each item's keys: its queries, then its text. */
static int take_key_mask(b2_ctx *ctx, buffers *w, const b2_qformer_in *in, b2_err *err)
{
    const uint8_t *text_mask = w->text > 0 ? in->texts->mask : NULL;
    size_t queries = (size_t)w->each, ld = queries + (size_t)w->longest;
    if (!in->query_mask && !text_mask)
        return 0;
    if (!(w->key_mask = b2_arena_take(ctx->scratch, (size_t)in->items * ld, 1, err)))
        return -1;
    memset(w->key_mask, 1, (size_t)in->items * ld);
    for (int64_t b = 0; b < in->items; b++) {
        uint8_t *row = w->key_mask + (size_t)b * ld;
        if (in->query_mask)
            memcpy(row, in->query_mask + (size_t)b * queries, queries);
        if (text_mask)
            memcpy(row + queries, text_mask + w->text_offsets[b], (size_t)w->text_lens[b]);
    }
    return 0;
}

static int take_buffers(b2_ctx *ctx, buffers *w, const b2_qformer_config *c, const b2_qformer_in *in, b2_err *err)
{
    int64_t items = in->items;
    int64_t pictures = in->pictures > 0 ? in->pictures : items;
    *w = (buffers){.each = in->queries, .queries = items * in->queries, .sees = in->sees, .image_mask = in->image_mask};
    w->image_tokens = w->queries > 0 ? in->image.rows / pictures : 0;
    w->longest = longest_text(in->texts, items);
    w->text = in->texts ? in->texts->offsets[items] - in->texts->offsets[0] : 0;
    int64_t rows = w->queries + w->text;
    size_t keys = (size_t)(b2_max64(pictures * w->image_tokens, rows) * c->hidden_size);
    if (b2_stage_take(ctx, &w->x, rows, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->q, rows, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->h, rows, c->hidden_size, err) < 0 ||
        b2_stage_take(ctx, &w->inner, b2_max64(w->queries, w->text), c->intermediate_size, err) < 0)
        return -1;
    w->k = b2_arena_take(ctx->activations, keys, sizeof *w->k, err);
    w->v = b2_arena_take(ctx->activations, keys, sizeof *w->v, err);
    if (!w->k || !w->v)
        return -1;
    if (b2_stage_equal_rows(ctx, &w->over_queries, items, w->each, w->each, err) < 0 ||
        b2_stage_equal_rows(ctx, &w->over_image, items, w->each, w->image_tokens, err) < 0 ||
        b2_stage_equal_rows(ctx, &w->text_alone, items, 0, 0, err) < 0)
        return -1;
    for (int64_t b = 0; in->pictures > 0 && b < items; b++)
        w->over_image.k_starts[b] = (int32_t)(in->picture_of[b] * w->image_tokens);
    if (w->text > 0 && take_text_tables(ctx, w, in, err) < 0)
        return -1;
    return take_key_mask(ctx, w, in, err);
}

/* One of the two kinds of rows: a stretch of the buffers' rows, and how many of them belong to one item where products of
 * whole items are faster. */
typedef struct part {
    int64_t first, rows, item_rows;
    int is_text;
} part;

static part query_part(const b2_ctx *ctx, const buffers *w)
{
    return (part){0, w->queries, b2_item_rows(ctx, w->each), 0};
}

static part text_part(const buffers *w)
{
    return (part){w->queries, w->text, 0, 1};
}

/* out = source . w + b on the rows of a part */
static int project(b2_ctx *ctx, b2_tensor out, b2_tensor source, part p, const b2_weight *weight, const b2_weight *bias,
                   b2_err *err)
{
    b2_linear_opts opts = {.bias = bias, .item_rows = p.item_rows};
    return b2_linear(ctx, b2_rows(out, p.first, p.rows), b2_rows(source, p.first, p.rows), weight, &opts, err);
}

/* x = LN(x + dense(h)) on the rows of a part */
static int add_and_norm(b2_ctx *ctx, const b2_qformer_config *c, const b2_qformer_attention *a, buffers *w, part p,
                        b2_err *err)
{
    b2_tensor x = b2_rows(w->x, p.first, p.rows);
    b2_linear_opts dense = {.bias = &a->dense_bias, .residual = x, .item_rows = p.item_rows};
    if (b2_linear(ctx, x, b2_rows(w->h, p.first, p.rows), &a->dense_weight, &dense, err) < 0)
        return -1;
    return b2_layer_norm(ctx, x, x, &a->norm_weight, &a->norm_bias, c->layer_norm_eps, err);
}

/* Each item's keys: its queries, then its text, of both what `sees` shows to this part. */
static b2_attention_args self_attention_args(const b2_qformer_config *c, const buffers *w, part p, b2_tensor k,
                                             b2_tensor v)
{
    int own = w->sees == B2_SEES_OWN && p.is_text;
    b2_attention_args args = b2_stage_attention(own ? &w->text_alone : &w->over_queries, b2_rows(w->h, p.first, p.rows),
                                                b2_rows(w->q, p.first, p.rows), k, v, c->num_attention_heads);
    args.key_mask = w->key_mask && own ? w->key_mask + w->each : w->key_mask;
    args.key_mask_ld = w->each + w->longest;
    if (w->text == 0 || (w->sees != B2_SEES_ALL && !p.is_text))
        return args;
    args.k_suffix = k;
    args.v_suffix = v;
    args.suffix_slots = w->slots;
    args.suffix_ld = w->longest;
    args.suffix_lens = w->text_lens;
    if (p.is_text) {
        args.q_offsets = w->text_offsets;
        args.causal = w->sees == B2_SEES_BEFORE;
    }
    return args;
}

static int self_attention(b2_ctx *ctx, const b2_qformer *m, int i, buffers *w, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    const b2_qformer_attention *a = &m->layers[i].self_attention;
    const part parts[] = {query_part(ctx, w), text_part(w)};
    const int first = w->queries > 0 ? 0 : 1, count = w->text > 0 ? 2 : 1;
    b2_tensor k = b2_tensor_of(w->k, w->x.rows, c->hidden_size), v = b2_tensor_of(w->v, w->x.rows, c->hidden_size);
    for (int p = first; p < count; p++)
        if (project(ctx, w->q, w->x, parts[p], &a->query_weight, &a->query_bias, err) < 0 ||
            project(ctx, k, w->x, parts[p], &a->key_weight, &a->key_bias, err) < 0 ||
            project(ctx, v, w->x, parts[p], &a->value_weight, &a->value_bias, err) < 0)
            return -1;
    for (int p = first; p < count; p++) {
        b2_attention_args args = self_attention_args(c, w, parts[p], k, v);
        if (b2_stage_attend(ctx, p == 0 ? "qformer" : "qformer_text", i, &args, err) < 0 ||
            add_and_norm(ctx, c, a, w, parts[p], err) < 0)
            return -1;
    }
    return 0;
}

/* The queries look at the picture: keys and values are computed from its embeddings once, however many items share it. */
static int cross_attention(b2_ctx *ctx, const b2_qformer *m, int i, buffers *w, b2_tensor image, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    const b2_qformer_attention *a = &m->layers[i].cross_attention;
    const part queries = query_part(ctx, w), pictures = {0, image.rows, b2_item_rows(ctx, w->image_tokens), 0};
    b2_tensor k = b2_tensor_of(w->k, image.rows, c->hidden_size), v = b2_tensor_of(w->v, image.rows, c->hidden_size);
    if (project(ctx, w->q, w->x, queries, &a->query_weight, &a->query_bias, err) < 0 ||
        project(ctx, k, image, pictures, &a->key_weight, &a->key_bias, err) < 0 ||
        project(ctx, v, image, pictures, &a->value_weight, &a->value_bias, err) < 0)
        return -1;
    b2_attention_args args = b2_stage_attention(&w->over_image, b2_rows(w->h, 0, w->queries),
                                                b2_rows(w->q, 0, w->queries), k, v, c->num_attention_heads);
    args.key_mask = w->image_mask;
    args.key_mask_ld = w->image_tokens;
    if (b2_stage_attend(ctx, "qformer_cross", i, &args, err) < 0)
        return -1;
    return add_and_norm(ctx, c, a, w, queries, err);
}

typedef struct feed_forward_weights {
    const b2_weight *up, *up_bias, *down, *down_bias, *norm, *norm_bias;
} feed_forward_weights;

static int feed_forward(b2_ctx *ctx, const b2_qformer_config *c, feed_forward_weights f, buffers *w, part p, b2_err *err)
{
    b2_tensor x = b2_rows(w->x, p.first, p.rows), inner = b2_rows(w->inner, 0, p.rows);
    b2_linear_opts up = {.bias = f.up_bias, .act = c->act, .item_rows = p.item_rows};
    b2_linear_opts down = {.bias = f.down_bias, .residual = x, .item_rows = p.item_rows};
    if (b2_linear(ctx, inner, x, f.up, &up, err) < 0 || b2_linear(ctx, x, inner, f.down, &down, err) < 0)
        return -1;
    return b2_layer_norm(ctx, x, x, f.norm, f.norm_bias, c->layer_norm_eps, err);
}

static int feed_forwards(b2_ctx *ctx, const b2_qformer *m, int i, buffers *w, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    const b2_qformer_layer *l = &m->layers[i];
    feed_forward_weights queries = {&l->intermediate_weight, &l->intermediate_bias, &l->output_weight, &l->output_bias,
                                    &l->norm_weight,         &l->norm_bias};
    feed_forward_weights text = {&l->text_intermediate_weight, &l->text_intermediate_bias, &l->text_output_weight,
                                 &l->text_output_bias,         &l->text_norm_weight,       &l->text_norm_bias};
    if (w->queries > 0 && feed_forward(ctx, c, queries, w, query_part(ctx, w), err) < 0)
        return -1;
    return w->text > 0 ? feed_forward(ctx, c, text, w, text_part(w), err) : 0;
}

static int done(b2_ctx *ctx, int layer, buffers *w, b2_err *err)
{
    if (w->queries > 0 && b2_stage_done(ctx, "qformer", layer, b2_rows(w->x, 0, w->queries), err) < 0)
        return -1;
    return w->text > 0 ? b2_stage_done(ctx, "qformer_text", layer, b2_rows(w->x, w->queries, w->text), err) : 0;
}

/* The queries' rows, which are the model's own for each item, or given. */
static int embed_queries(b2_ctx *ctx, const b2_qformer *m, buffers *w, const b2_qformer_in *in, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    b2_tensor own = b2_tensor_of((float *)m->query_tokens.data, c->num_query_tokens, c->hidden_size);
    if (in->embeds.data)
        return b2_layer_norm(ctx, b2_rows(w->x, 0, w->queries), in->embeds, &m->norm_weight, &m->norm_bias,
                             c->layer_norm_eps, err);
    for (int64_t b = 0; w->each > 0 && b < in->items; b++)
        if (b2_layer_norm(ctx, b2_rows(w->x, b * w->each, w->each), own, &m->norm_weight, &m->norm_bias,
                          c->layer_norm_eps, err) < 0)
            return -1;
    return 0;
}

static int embed_text(b2_ctx *ctx, const b2_qformer *m, buffers *w, const b2_texts *texts, b2_err *err)
{
    b2_tensor text = b2_rows(w->x, w->queries, w->text), given = text;
    if (texts->ids && (b2_embedding(ctx, text, &m->word_embeddings, texts->ids, 0, 0, err) < 0 ||
                       b2_embedding(ctx, text, &m->position_embeddings, w->positions, 0, 1, err) < 0))
        return -1;
    if (!texts->ids)
        given = b2_tensor_of((float *)texts->embeds, w->text, m->config.hidden_size);
    return b2_layer_norm(ctx, text, given, &m->norm_weight, &m->norm_bias, m->config.layer_norm_eps, err);
}

static int embed(b2_ctx *ctx, const b2_qformer *m, buffers *w, const b2_qformer_in *in, b2_err *err)
{
    if (embed_queries(ctx, m, w, in, err) < 0 || (w->text > 0 && embed_text(ctx, m, w, in->texts, err) < 0))
        return -1;
    return done(ctx, 0, w, err);
}

/* Layer 0's self-attention, taken from where it was computed before unless someone wants to look at it. */
static int first_self_attention(b2_ctx *ctx, const b2_qformer *m, buffers *w, const b2_qformer_in *in, b2_err *err)
{
    b2_tensor start = b2_tensor_of(m->start, m->config.num_query_tokens, m->config.hidden_size);
    int alone = w->text == 0 && !in->embeds.data && !w->key_mask;
    if (!m->start || !alone || (ctx->tap && ctx->tap->attention))
        return self_attention(ctx, m, 0, w, err);
    for (int64_t b = 0; b < in->items; b++)
        if (b2_copy_rows(ctx, b2_rows(w->x, b * start.rows, start.rows), NULL, start, NULL, start.rows, err) < 0)
            return -1;
    return 0;
}

int b2_qformer_prepare(b2_ctx *ctx, b2_qformer *m, b2_err *err)
{
    const b2_qformer_config *c = &m->config;
    b2_qformer_in in = {.items = 1, .queries = c->num_query_tokens, .image = {.rows = 1}};
    buffers w;
    if (c->num_hidden_layers == 0 || c->text_side == B2_TEXT_BESIDE)
        return 0;
    float *start = b2_memory_alloc(ctx->memory, (size_t)(c->num_query_tokens * c->hidden_size), sizeof *start,
                                   "Q-Former start", err);
    int status = start ? b2_ctx_reserve(ctx, b2_qformer_scratch(ctx, m, 1, in.queries, 1, 1, 0), err) : -1;
    if (status == 0 && (take_buffers(ctx, &w, c, &in, err) < 0 || embed(ctx, m, &w, &in, err) < 0 ||
                        self_attention(ctx, m, 0, &w, err) < 0 ||
                        b2_copy_rows(ctx, b2_tensor_of(start, w.queries, c->hidden_size), NULL, w.x, NULL, w.queries,
                                     err) < 0))
        status = -1;
    b2_ctx_reset(ctx, (b2_ctx_mark){0});
    int64_t bad = -1;
    if (status == 0) /* this, because nobody reads the start who would hear of what was noted */
        status = b2_check_finite(ctx, &bad, b2_tensor_of(start, c->num_query_tokens, c->hidden_size), err);
    if (status == 0 && bad < 0) {
        m->start = start;
        m->start_memory = ctx->memory;
        return 0;
    }
    b2_wait(ctx);
    b2_memory_free(ctx->memory, start);
    if (status == 0)
        return 0; /* whoever uses the Q-Former will hear of it */
    if (err->code != B2_E_NUMERIC)
        return -1;
    *err = (b2_err){0}; /* whoever uses the Q-Former will hear of it */
    return 0;
}

/* Rows [first, ...) of the buffers, where somebody wants them. */
static int hand_out(b2_ctx *ctx, const buffers *w, b2_tensor out, int64_t first, b2_err *err)
{
    return out.data ? b2_copy_rows(ctx, out, NULL, b2_rows(w->x, first, out.rows), NULL, out.rows, err) : 0;
}

int b2_qformer_forward(b2_ctx *ctx, const b2_qformer *m, const b2_qformer_out *out, const b2_qformer_in *in,
                       b2_err *err)
{
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    buffers w;
    if (take_buffers(ctx, &w, &m->config, in, err) < 0 || embed(ctx, m, &w, in, err) < 0)
        return -1;
    for (int i = 0; i < m->config.num_hidden_layers; i++) {
        int crosses = w.queries > 0 && has_cross_attention(&m->config, i);
        int status = i == 0 ? first_self_attention(ctx, m, &w, in, err) : self_attention(ctx, m, i, &w, err);
        if (status < 0 || (crosses && cross_attention(ctx, m, i, &w, in->image, err) < 0) ||
            feed_forwards(ctx, m, i, &w, err) < 0 || done(ctx, i + 1, &w, err) < 0)
            return -1;
    }
    int status = hand_out(ctx, &w, out->queries, 0, err);
    if (status == 0)
        status = hand_out(ctx, &w, out->text, w.queries, err);
    b2_ctx_reset(ctx, mark);
    return status;
}
