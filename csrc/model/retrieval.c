#include "model/retrieval.h"

#include "model/stage.h"

/* What goes through together: enough to keep the cores busy, few enough to stay small. */
enum { TEXTS_AT_ONCE = 64, ROWS_AT_ONCE = 6144, PICTURES_AT_ONCE = 4, PRODUCTS_AT_ONCE = 1 << 20 };

static int64_t longest_of(const b2_texts *texts, int64_t first, int64_t count)
{
    int64_t longest = 0;
    for (int64_t b = first; b < first + count; b++)
        longest = b2_max64(longest, texts->offsets[b + 1] - texts->offsets[b]);
    return longest;
}

/* How many of `count` texts go through together, each with at most `rows` rows. */
static int64_t texts_at_once(int64_t count, int64_t rows)
{
    int64_t most = b2_max64(ROWS_AT_ONCE / b2_max64(rows, 1), 1);
    return b2_min64(b2_min64(most, TEXTS_AT_ONCE), count);
}

static int read_group(b2_ctx *ctx, const b2_blip2 *m, const b2_read *out, const b2_texts *texts, int64_t first,
                      int64_t count, b2_err *err)
{
    b2_texts own = b2_texts_from(*texts, first);
    int64_t start = own.offsets[0] - texts->offsets[0], tokens = own.offsets[count] - own.offsets[0];
    b2_qformer_in in = {.items = count, .texts = &own};
    b2_tensor text = out->text.data ? b2_rows(out->text, start, tokens) : (b2_tensor){0}, hidden;
    b2_tensor outer = out->embeds.data ? b2_rows(out->embeds, start, tokens) : (b2_tensor){0}, embeds;
    if (b2_room_for(ctx, &hidden, text, err) < 0 || b2_room_for(ctx, &embeds, outer, err) < 0 ||
        (!hidden.data && b2_stage_take(ctx, &hidden, tokens, m->qformer.config.hidden_size, err) < 0) ||
        b2_qformer_forward(ctx, &m->qformer, &(b2_qformer_out){.text = hidden}, &in, err) < 0 ||
        (embeds.data && b2_heads_project_text(ctx, &m->heads, embeds, hidden, err) < 0))
        return -1;
    return b2_hand_over(ctx, text, hidden, err) < 0 ? -1 : b2_hand_over(ctx, outer, embeds, err);
}

int b2_blip2_read_texts(b2_ctx *ctx, const b2_blip2 *m, const b2_read *out, const b2_texts *texts, int64_t count,
                        b2_err *err)
{
    if (m->qformer.config.text_side != B2_TEXT_APART)
        return b2_fail(err, B2_E_UNSUPPORTED, "this model's Q-Former does not read texts alone");
    if (b2_texts_check(&m->qformer.config, texts, count, err) < 0)
        return -1;
    int64_t longest = longest_of(texts, 0, count), at_once = texts_at_once(count, longest);
    size_t hidden = b2_arena_cost((size_t)(at_once * longest * m->qformer.config.hidden_size), sizeof(float));
    size_t work = b2_qformer_scratch(ctx, &m->qformer, at_once, 0, 0, 0, longest);
    size_t heads = b2_heads_scratch(ctx, &m->heads, at_once * longest);
    size_t embeds = b2_outer_bytes(ctx, at_once * longest, out->embeds.cols);
    if (b2_ctx_reserve(ctx, hidden + embeds + (work > heads ? work : heads), err) < 0)
        return -1;
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    for (int64_t first = 0; first < count; first += at_once) {
        if (read_group(ctx, m, out, texts, first, count - first < at_once ? count - first : at_once, err) < 0)
            return -1;
        b2_ctx_reset(ctx, mark);
    }
    return 0;
}

/* Texts of one call of b2_blip2_match. */
typedef struct pairs {
    b2_tensor images;          /* [M*T, E] */
    int64_t tokens;            /* T */
    const b2_texts *texts;
    const int32_t *picture_of; /* [N] */
} pairs;

/* How many texts from `first` on go through together: at most `at_once`, of few pictures. */
static int64_t group_of(const pairs *p, int64_t first, int64_t count, int64_t at_once)
{
    int64_t end = first + 1;
    while (end < count && end - first < at_once && p->picture_of[end] - p->picture_of[first] < PICTURES_AT_ONCE)
        end++;
    return end - first;
}

static int match_group(b2_ctx *ctx, const b2_blip2 *m, b2_tensor out, const pairs *p, int64_t first, int64_t count,
                       b2_err *err)
{
    int64_t queries = m->qformer.config.num_query_tokens, picture = p->picture_of[first];
    int64_t pictures = p->picture_of[first + count - 1] - picture + 1;
    b2_texts own = b2_texts_from(*p->texts, first);
    int32_t picture_of[TEXTS_AT_ONCE];
    b2_tensor states, image, outer = b2_rows(out, first, count), match;
    if (b2_bring_in(ctx, &image, b2_rows(p->images, picture * p->tokens, pictures * p->tokens), err) < 0 ||
        b2_room_for(ctx, &match, outer, err) < 0)
        return -1;
    for (int64_t i = 0; i < count; i++)
        picture_of[i] = (int32_t)(p->picture_of[first + i] - picture);
    b2_qformer_in in = {.items = count,
                        .queries = queries,
                        .image = image,
                        .pictures = pictures,
                        .picture_of = picture_of,
                        .texts = &own};
    if (b2_stage_take(ctx, &states, count * queries, m->qformer.config.hidden_size, err) < 0 ||
        b2_qformer_forward(ctx, &m->qformer, &(b2_qformer_out){.queries = states}, &in, err) < 0 ||
        b2_heads_match(ctx, &m->heads, match, states, err) < 0)
        return -1;
    return b2_hand_over(ctx, outer, match, err);
}

static int check_pairs(const b2_blip2 *m, const pairs *p, int64_t count, int64_t pictures, b2_err *err)
{
    if (m->qformer.config.text_side != B2_TEXT_APART)
        return b2_fail(err, B2_E_UNSUPPORTED, "this model does not compare pictures and texts");
    for (int64_t i = 0; i < count; i++)
        if (p->picture_of[i] < (i > 0 ? p->picture_of[i - 1] : 0) || p->picture_of[i] >= pictures)
            return b2_fail(err, B2_E_INDEX, "picture_of[%lld] is %d: expected ascending numbers below %lld", (long long)i,
                           (int)p->picture_of[i], (long long)pictures);
    return b2_texts_check(&m->qformer.config, p->texts, count, err);
}

int b2_blip2_match(b2_ctx *ctx, const b2_blip2 *m, b2_tensor out, b2_tensor images, int64_t pictures,
                   const b2_texts *texts, const int32_t *picture_of, b2_err *err)
{
    int64_t count = out.rows, queries = m->qformer.config.num_query_tokens;
    pairs p = {.images = images, .tokens = pictures ? images.rows / pictures : 0, .texts = texts, .picture_of = picture_of};
    if (check_pairs(m, &p, count, pictures, err) < 0)
        return -1;
    int64_t longest = longest_of(texts, 0, count), at_once = texts_at_once(count, queries + longest);
    int64_t together = b2_min64(pictures, PICTURES_AT_ONCE);
    size_t work = b2_qformer_scratch(ctx, &m->qformer, at_once, queries, together, p.tokens, longest);
    size_t heads = b2_heads_scratch(ctx, &m->heads, at_once * queries);
    size_t states = b2_arena_cost((size_t)(at_once * queries * m->qformer.config.hidden_size), sizeof(float));
    size_t outer = b2_outer_bytes(ctx, together * p.tokens, images.cols) + b2_outer_bytes(ctx, at_once, out.cols);
    if (b2_ctx_reserve(ctx, states + outer + (work > heads ? work : heads), err) < 0)
        return -1;
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    for (int64_t first = 0, some; first < count; first += some) {
        some = group_of(&p, first, count, at_once);
        if (match_group(ctx, m, out, &p, first, some, err) < 0)
            return -1;
        b2_ctx_reset(ctx, mark);
    }
    return 0;
}

int b2_blip2_run_qformer(b2_ctx *ctx, const b2_blip2 *m, const b2_qformer_out *out, const b2_qformer_in *in, b2_err *err)
{
    if (in->texts && m->qformer.config.text_side == B2_TEXT_NONE)
        return b2_fail(err, B2_E_UNSUPPORTED, "this model's Q-Former reads no text");
    if (in->items == 0)
        return 0;
    int64_t longest = in->texts ? longest_of(in->texts, 0, in->items) : 0;
    size_t bytes = b2_qformer_scratch(ctx, &m->qformer, in->items, in->queries, in->items, in->image.rows / in->items,
                                      longest);
    b2_qformer_in inner = *in;
    b2_qformer_out states;
    b2_tensor words = {0};
    b2_texts texts = in->texts ? *in->texts : (b2_texts){0};
    int64_t width = m->qformer.config.hidden_size, tokens = in->texts ? texts.offsets[in->items] - texts.offsets[0] : 0;
    if (in->texts && texts.embeds)
        words = b2_tensor_of((float *)texts.embeds, tokens, width);
    size_t outer = b2_outer_bytes(ctx, in->image.rows, in->image.cols) +
                   2 * b2_outer_bytes(ctx, in->items * in->queries + tokens, width) + 4 * b2_arena_cost(1, 1);
    if (b2_ctx_reserve(ctx, bytes + outer, err) < 0 || b2_bring_in(ctx, &inner.image, in->image, err) < 0 ||
        b2_bring_in(ctx, &inner.embeds, in->embeds, err) < 0 || b2_bring_in(ctx, &words, words, err) < 0 ||
        b2_room_for(ctx, &states.queries, out->queries, err) < 0 || b2_room_for(ctx, &states.text, out->text, err) < 0)
        return -1;
    texts.embeds = words.data;
    inner.texts = in->texts ? &texts : NULL;
    if (b2_qformer_forward(ctx, &m->qformer, &states, &inner, err) < 0 ||
        b2_hand_over(ctx, out->queries, states.queries, err) < 0)
        return -1;
    return b2_hand_over(ctx, out->text, states.text, err);
}

int b2_similarity(b2_ctx *ctx, b2_tensor out, b2_tensor images, b2_tensor texts, int64_t queries, b2_err *err)
{
    if (out.rows == 0 || out.cols == 0)
        return 0;
    /* Each product is one chain over ascending P, whatever stands beside it. */
    b2_weight weight = {.name = "texts", .data = texts.data, .n = texts.rows, .k = texts.cols, .layout = B2_ROWS};
    b2_linear_opts opts = {0};
    int64_t group = b2_max64(PRODUCTS_AT_ONCE / (queries * texts.rows), 1);
    group = group < out.rows ? group : out.rows;
    int64_t rows = group * queries;
    if (b2_ctx_reserve(ctx,
                         b2_arena_cost((size_t)(rows * texts.rows), sizeof(float)) +
                             b2_scratch_bytes(ctx, rows, b2_max64(texts.rows, texts.cols), 1, 1),
                         err) < 0)
        return -1;
    for (int64_t first = 0; first < out.rows; first += group) {
        b2_ctx_mark mark = b2_ctx_marked(ctx);
        int64_t count = out.rows - first < group ? out.rows - first : group;
        b2_tensor products;
        if (b2_stage_take(ctx, &products, count * queries, texts.rows, err) < 0 ||
            b2_linear(ctx, products, b2_rows(images, first * queries, count * queries), &weight, &opts, err) < 0 ||
            b2_reduce_rows(ctx, b2_rows(out, first, count), products, B2_MAX, err) < 0)
            return -1;
        b2_ctx_reset(ctx, mark);
    }
    return 0;
}
