#include "model/session.h"

#include <string.h>

#include "core/memory.h"
#include "model/stage.h"

/* Tokens that are prefilled together: bounds the activations, changes no bit. Rows are never split. */
enum { PREFILL_TOKENS = 512 };

typedef struct session {
    b2_step step; /* first: the search calls it */
    b2_ctx *ctx;
    const b2_blip2 *model;
    const b2_rows_in *in;     /* what the search counts: of an encoder-decoder the decoder's rows */
    const b2_rows_in *source; /* the encoder's rows, or NULL */
    b2_rows_in decoder;
    b2_kv_cache cache;
    b2_kv_cache cross;
    int32_t *source_starts, *source_lens; /* [B] in the cross cache */
    int64_t longest_source;
    uint8_t *source_mask;     /* [max(B, R), longest_source] of the rows of one call; NULL without pads */
    int64_t beams;
    int64_t running;          /* R = B * beams */
    int64_t steps_taken;
    uint64_t allocations;     /* heap allocations so far at the end of the prefill ... */
    uint64_t step_allocations;/* ... and made between then and the end of the last step */
    /* Of the prompts, in packed order. */
    int32_t *positions;       /* [N] */
    int32_t *cache_rows;      /* [N]: 0 .. N-1 */
    int32_t *starts;          /* [B + 1] */
    int32_t *lens;            /* [B] */
    int32_t *next_position;   /* [B]: of the first new token */
    int64_t *leading_pads;    /* [B] */
    int counts_pads;          /* positions are places in the row, pads counted: forward() of some models */
    int has_pads;
    int64_t longest;          /* tokens of the longest prompt */
    /* Of the running rows. */
    int32_t *slots[2];        /* [R, steps]: suffix of each row, before and after a step */
    int current;              /* which of the two is valid */
    uint8_t *key_mask;        /* [R, longest + steps]; NULL without pads */
    /* Of one step. */
    int32_t *step_offsets;    /* [R + 1] */
    int32_t *step_positions, *step_cache_rows, *step_starts, *step_lens, *step_suffix_lens; /* [R] */
    int32_t *step_slots;      /* [R, steps] */
    uint8_t *step_mask;       /* [R, longest + steps] */
    void *blocks[20];         /* everything above, owned */
    int block_count;
} session;

static int check_decoder_rows(const b2_blip2 *model, const b2_rows_in *in, b2_err *err)
{
    for (int64_t b = 0; b < in->rows; b++) {
        if (in->decoder_offsets[b + 1] <= in->decoder_offsets[b])
            return b2_fail(err, B2_E_VALUE, "row %lld: the decoder's prompt is empty", (long long)b);
        for (int64_t i = in->decoder_offsets[b]; i < in->decoder_offsets[b + 1]; i++)
            if (in->decoder_ids[i] < 0 || in->decoder_ids[i] >= model->lm->config.vocab_size)
                return b2_fail(err, B2_E_INDEX, "row %lld: decoder token id %d is outside the vocabulary of %lld",
                               (long long)b, (int)in->decoder_ids[i], (long long)model->lm->config.vocab_size);
    }
    return 0;
}

int b2_session_check(const b2_blip2 *model, const b2_rows_in *in, b2_err *err)
{
    if (model->lm->class_->encode && check_decoder_rows(model, in, err) < 0)
        return -1;

    int64_t places_each = in->features.data && in->rows > 0 ? in->features.rows / in->rows : 0;
    int64_t vocabulary = model->lm->config.vocab_size, limit = model->lm->config.max_position_embeddings;
    if (in->offsets[0] != 0)
        return b2_fail(err, B2_E_VALUE, "offsets: expected to begin with 0, found %lld", (long long)in->offsets[0]);
    for (int64_t b = 0; b < in->rows; b++) {
        int64_t length = in->offsets[b + 1] - in->offsets[b], places = 0, seen = 0;
        if (length < 1)
            return b2_fail(err, B2_E_VALUE, "row %lld: the prompt is empty", (long long)b);
        for (int64_t i = in->offsets[b]; i < in->offsets[b + 1]; i++) {
            if (in->ids[i] < -1 || in->ids[i] >= vocabulary)
                return b2_fail(err, B2_E_INDEX, "row %lld: token id %d is outside the vocabulary of %lld", (long long)b,
                               (int)in->ids[i], (long long)vocabulary);
            places += in->ids[i] == -1;
            seen += !in->mask || in->mask[i];
        }
        if (places != places_each)
            return b2_fail(err, B2_E_VALUE, "row %lld: %lld image places in the prompt, expected %lld", (long long)b,
                           (long long)places, (long long)places_each);
        if (seen > limit)
            return b2_fail(err, B2_E_VALUE, "row %lld: the prompt has %lld tokens, the language model has positions for %lld",
                           (long long)b, (long long)seen, (long long)limit);
        if (seen < 1)
            return b2_fail(err, B2_E_VALUE, "row %lld: every token is masked", (long long)b);
    }
    return 0;
}

static void *own(session *s, size_t count, size_t size, b2_err *err)
{
    void *block = b2_alloc_zeroed(count, size, "session", err);
    if (block)
        s->blocks[s->block_count++] = block;
    return block;
}

static void session_release(session *s)
{
    for (int i = 0; i < s->block_count; i++)
        b2_free(s->blocks[i]);
    b2_kv_cache_release(&s->cache);
    b2_kv_cache_release(&s->cross);
}

static int own_prompt_tables(session *s, b2_err *err)
{
    int64_t rows = s->in->rows, tokens = s->in->offsets[rows];
    s->positions = own(s, (size_t)tokens, sizeof(int32_t), err);
    s->cache_rows = own(s, (size_t)tokens, sizeof(int32_t), err);
    s->starts = own(s, (size_t)rows + 1, sizeof(int32_t), err);
    s->lens = own(s, (size_t)rows, sizeof(int32_t), err);
    s->next_position = own(s, (size_t)rows, sizeof(int32_t), err);
    s->leading_pads = own(s, (size_t)rows, sizeof(int64_t), err);
    return s->positions && s->cache_rows && s->starts && s->lens && s->next_position && s->leading_pads ? 0 : -1;
}

/* Positions as forward() upstream counts them: cumsum(mask) * mask - 1, or the place in the row. */
static void fill_prompt_tables(session *s)
{
    const b2_rows_in *in = s->in;
    for (int64_t b = 0; b < in->rows; b++) {
        int32_t seen = 0;
        s->starts[b] = (int32_t)in->offsets[b];
        s->lens[b] = (int32_t)(in->offsets[b + 1] - in->offsets[b]);
        for (int64_t i = in->offsets[b]; i < in->offsets[b + 1]; i++) {
            int real = !in->mask || in->mask[i];
            seen += real;
            s->positions[i] = s->counts_pads ? (int32_t)(i - in->offsets[b]) : real ? seen - 1 : -1;
            s->cache_rows[i] = (int32_t)i;
            s->has_pads |= !real;
            s->leading_pads[b] += seen == 0;
        }
        s->next_position[b] = seen;
        if (s->lens[b] > s->longest)
            s->longest = s->lens[b];
    }
    s->starts[in->rows] = (int32_t)in->offsets[in->rows];
}

static int own_step_tables(session *s, b2_err *err)
{
    size_t running = (size_t)s->running, suffix = running * (size_t)(s->cache.steps + 1);
    s->slots[0] = own(s, suffix, sizeof(int32_t), err);
    s->slots[1] = own(s, suffix, sizeof(int32_t), err);
    s->step_slots = own(s, suffix, sizeof(int32_t), err);
    s->step_offsets = own(s, running + 1, sizeof(int32_t), err);
    s->step_positions = own(s, running, sizeof(int32_t), err);
    s->step_cache_rows = own(s, running, sizeof(int32_t), err);
    s->step_starts = own(s, running, sizeof(int32_t), err);
    s->step_lens = own(s, running, sizeof(int32_t), err);
    s->step_suffix_lens = own(s, running, sizeof(int32_t), err);
    if (!s->slots[0] || !s->slots[1] || !s->step_slots || !s->step_offsets || !s->step_positions ||
        !s->step_cache_rows || !s->step_starts || !s->step_lens || !s->step_suffix_lens)
        return -1;
    size_t mask = running * (size_t)(s->longest + s->cache.steps);
    s->step_mask = s->has_pads ? own(s, mask, 1, err) : NULL;
    return s->has_pads && !s->step_mask ? -1 : 0;
}

/* The encoder's rows stand beside the decoder's, which then are what the session is about. */
static int open_source(session *s, const b2_rows_in *in, int64_t beams, b2_err *err)
{
    int has_pads = 0;
    if (!s->model->lm->class_->encode)
        return 0;
    s->source = in;
    s->decoder = (b2_rows_in){.rows = in->rows, .ids = in->decoder_ids, .offsets = in->decoder_offsets,
                              .mask = in->decoder_mask};
    s->in = &s->decoder;
    s->source_starts = own(s, (size_t)in->rows, sizeof(int32_t), err);
    s->source_lens = own(s, (size_t)in->rows, sizeof(int32_t), err);
    if (!s->source_starts || !s->source_lens)
        return -1;
    for (int64_t b = 0; b < in->rows; b++) {
        s->source_starts[b] = (int32_t)in->offsets[b];
        s->source_lens[b] = (int32_t)(in->offsets[b + 1] - in->offsets[b]);
        s->longest_source = b2_max64(s->longest_source, s->source_lens[b]);
        for (int64_t i = in->offsets[b]; i < in->offsets[b + 1]; i++)
            has_pads |= in->mask && !in->mask[i];
    }
    if (has_pads && !(s->source_mask = own(s, (size_t)(in->rows * beams * s->longest_source), 1, err)))
        return -1;
    return b2_kv_cache_create(&s->cross, s->model->lm->kv_layers, s->model->lm->kv_width, in->offsets[in->rows], 0, 0,
                              err);
}

/* `beams` running rows for each prompt, room for `steps` tokens after it. */
static int session_open(session *s, b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, int64_t beams,
                        int64_t steps, b2_err *err)
{
    s->ctx = ctx;
    s->model = model;
    s->in = in;
    s->beams = beams;
    s->running = in->rows * beams;
    if (in->offsets[in->rows] > INT32_MAX)
        return b2_fail(err, B2_E_VALUE, "%lld tokens are too many for one batch", (long long)in->offsets[in->rows]);
    if (s->running > INT32_MAX)
        return b2_fail(err, B2_E_VALUE, "num_beams: %lld beams for %lld rows are too many", (long long)beams,
                       (long long)in->rows);
    if (open_source(s, in, beams, err) < 0 || own_prompt_tables(s, err) < 0)
        return -1;
    fill_prompt_tables(s);
    if (b2_kv_cache_create(&s->cache, model->lm->kv_layers, model->lm->kv_width, s->in->offsets[in->rows], s->running,
                           steps, err) < 0)
        return -1;
    return own_step_tables(s, err);
}

/* [rows, keys] mask of prompts [first, last), one byte per key. */
static void fill_prefill_mask(session *s, int64_t first, int64_t last)
{
    for (int64_t b = first; b < last; b++)
        memcpy(s->step_mask + (b - first) * s->longest, s->in->mask + s->in->offsets[b], (size_t)s->lens[b]);
}

/* x [N, D]: token embeddings, and the picture's features where the id is -1. */
static int embed_rows(session *s, const b2_rows_in *in, b2_tensor x, int64_t first, int64_t last, b2_err *err)
{
    const b2_lm *lm = s->model->lm;
    int64_t begin = in->offsets[first], places = in->features.rows / in->rows;
    if (lm->class_->embed(s->ctx, lm, x, in->ids + begin, err) < 0)
        return -1;
    for (int64_t b = first; b < last && in->features.data; b++) {
        int64_t taken = 0;
        for (int64_t i = in->offsets[b]; i < in->offsets[b + 1]; i++) {
            if (in->ids[i] != -1)
                continue;
            b2_tensor to = b2_rows(x, i - begin, 1), from = b2_rows(in->features, b * places + taken++, 1);
            if (b2_copy_rows(s->ctx, to, NULL, from, NULL, 1, err) < 0)
                return -1;
        }
    }
    return 0;
}

/* What the rows of one call read of the encoder. */
typedef struct cross_rows {
    int32_t *starts, *lens; /* [n]; NULL without an encoder */
} cross_rows;

static int take_cross_rows(session *s, cross_rows *cross, int64_t n, b2_err *err)
{
    *cross = (cross_rows){0};
    if (!s->source)
        return 0;
    cross->starts = b2_arena_take(s->ctx->scratch, (size_t)n, sizeof(int32_t), err);
    cross->lens = b2_arena_take(s->ctx->scratch, (size_t)n, sizeof(int32_t), err);
    return cross->starts && cross->lens ? 0 : -1;
}

/* Row i of a call reads prompt b. */
static void read_source(session *s, cross_rows *cross, int64_t i, int64_t b)
{
    cross->starts[i] = s->source_starts[b];
    cross->lens[i] = s->source_lens[b];
    if (s->source_mask)
        memcpy(s->source_mask + i * s->longest_source, s->source->mask + s->source->offsets[b],
               (size_t)s->source_lens[b]);
}

/* One prompt through the encoder into the cross cache. */
static int encode_row(session *s, int64_t b, b2_err *err)
{
    const b2_lm *lm = s->model->lm;
    const b2_rows_in *in = s->source;
    int64_t begin = in->offsets[b], tokens = in->offsets[b + 1] - begin;
    size_t mark = b2_arena_mark(s->ctx->scratch);
    float *x = b2_arena_take(s->ctx->scratch, (size_t)(tokens * lm->config.hidden_size), sizeof *x, err);
    int32_t *rows = b2_arena_take(s->ctx->scratch, (size_t)tokens, sizeof *rows, err);
    if (!x || !rows)
        return -1;
    for (int64_t i = 0; i < tokens; i++)
        rows[i] = (int32_t)(begin + i);
    const int32_t offsets[2] = {0, (int32_t)tokens};
    b2_lm_batch batch = {
        .x = b2_tensor_of(x, tokens, lm->config.hidden_size),
        .rows = 1,
        .q_offsets = offsets,
        .cache = &s->cross,
        .cache_rows = rows,
        .key_mask = s->source_mask ? in->mask + begin : NULL,
        .key_mask_ld = tokens,
    };
    if (embed_rows(s, in, batch.x, b, b + 1, err) < 0 || lm->class_->encode(s->ctx, lm, &batch, err) < 0)
        return -1;
    b2_arena_reset(s->ctx->scratch, mark);
    return 0;
}

static int encode_source(session *s, b2_err *err)
{
    for (int64_t b = 0; s->source && b < s->source->rows; b++)
        if (encode_row(s, b, err) < 0)
            return -1;
    return 0;
}

/* Prompts [first, last) through the model. `logit_rows` within these tokens; NULL: all of them. */
static int prefill_rows(session *s, int64_t first, int64_t last, const int32_t *logit_rows, b2_tensor logits, b2_err *err)
{
    const b2_rows_in *in = s->in;
    int64_t begin = in->offsets[first], tokens = in->offsets[last] - begin;
    size_t mark = b2_arena_mark(s->ctx->scratch);
    float *x = b2_arena_take(s->ctx->scratch, (size_t)(tokens * s->model->lm->config.hidden_size), sizeof *x, err);
    int32_t *offsets = b2_arena_take(s->ctx->scratch, (size_t)(last - first + 1), sizeof *offsets, err);
    cross_rows cross;
    if (!x || !offsets || take_cross_rows(s, &cross, last - first, err) < 0)
        return -1;
    for (int64_t b = first; b <= last; b++)
        offsets[b - first] = (int32_t)(in->offsets[b] - begin);
    if (s->has_pads)
        fill_prefill_mask(s, first, last);
    b2_lm_batch batch = {
        .x = b2_tensor_of(x, tokens, s->model->lm->config.hidden_size),
        .rows = last - first,
        .q_offsets = offsets,
        .positions = s->positions + begin,
        .cache = &s->cache,
        .cache_rows = s->cache_rows + begin,
        .prefix_starts = s->starts + first,
        .prefix_lens = s->lens + first,
        .key_mask = s->has_pads ? s->step_mask : NULL,
        .key_mask_ld = s->longest,
        .cross = s->source ? &s->cross : NULL,
        .cross_starts = cross.starts,
        .cross_lens = cross.lens,
        .cross_mask = s->source_mask,
        .cross_mask_ld = s->longest_source,
        .logit_rows = logit_rows,
        .logits = logits,
    };
    for (int64_t b = first; s->source && b < last; b++)
        read_source(s, &cross, b - first, b);
    if (embed_rows(s, in, batch.x, first, last, err) < 0 ||
        s->model->lm->class_->forward(s->ctx, s->model->lm, &batch, err) < 0)
        return -1;
    b2_arena_reset(s->ctx->scratch, mark);
    return 0;
}

/* The last row of a group that begins with `first`: as many rows as fit in PREFILL_TOKENS, at least one. */
static int64_t group_end(const session *s, int64_t first)
{
    int64_t last = first + 1;
    while (last < s->in->rows && s->in->offsets[last + 1] - s->in->offsets[first] <= PREFILL_TOKENS)
        last++;
    return last;
}

static int64_t largest_group(const session *s)
{
    return s->longest > PREFILL_TOKENS ? s->longest : PREFILL_TOKENS < s->in->offsets[s->in->rows]
               ? PREFILL_TOKENS
               : s->in->offsets[s->in->rows];
}

static int reserve(session *s, int64_t logits_at_once, b2_err *err)
{
    const b2_lm *lm = s->model->lm;
    int64_t tokens = largest_group(s) > s->running ? largest_group(s) : s->running;
    size_t bytes = b2_arena_cost((size_t)(tokens * lm->config.hidden_size), sizeof(float)) +
                   2 * b2_arena_cost((size_t)(s->running + s->in->rows + 1), sizeof(int32_t)) +
                   2 * b2_arena_cost((size_t)(s->running + s->in->rows), sizeof(int32_t)) +
                   lm->class_->scratch(s->ctx, lm, tokens, b2_max64(s->longest + s->cache.steps, s->longest_source),
                                       logits_at_once);
    if (s->source)
        bytes += b2_arena_cost((size_t)(s->longest_source * lm->config.hidden_size), sizeof(float)) +
                 b2_arena_cost((size_t)s->longest_source, sizeof(int32_t)) +
                 lm->class_->encode_scratch(s->ctx, lm, s->longest_source, s->longest_source);
    return b2_arena_reserve(s->ctx->scratch, bytes, err);
}

static int forward_all(session *s, b2_tensor logits, b2_err *err)
{
    if (reserve(s, largest_group(s), err) < 0 || encode_source(s, err) < 0)
        return -1;
    for (int64_t first = 0; first < s->in->rows;) {
        int64_t last = group_end(s, first), begin = s->in->offsets[first];
        if (prefill_rows(s, first, last, NULL, b2_rows(logits, begin, s->in->offsets[last] - begin), err) < 0)
            return -1;
        first = last;
    }
    return 0;
}

int b2_session_forward(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, b2_tensor logits, b2_err *err)
{
    session s = {.counts_pads = model->lm->class_->forward_counts_pads};
    if (b2_session_check(model, in, err) < 0)
        return -1;
    if (in->rows == 0)
        return 0;
    int status = session_open(&s, ctx, model, in, 1, 0, err);
    if (status == 0)
        status = forward_all(&s, logits, err);
    session_release(&s);
    return status;
}

static int check_logits(session *s, b2_tensor logits, b2_err *err)
{
    int64_t bad = -1;
    if (b2_check_finite(s->ctx, &bad, logits, err) < 0)
        return -1;
    return bad < 0 ? 0 : b2_fail(err, B2_E_NUMERIC, "language_model head: NaN or Inf in the logits of row %lld",
                                 (long long)bad);
}

static int session_prefill(b2_step *step, float *logits, b2_err *err)
{
    session *s = (session *)step;
    b2_tensor all = b2_tensor_of(logits, s->in->rows, step->vocabulary);
    if (encode_source(s, err) < 0)
        return -1;
    for (int64_t first = 0; first < s->in->rows;) {
        int64_t last = group_end(s, first), begin = s->in->offsets[first];
        size_t mark = b2_arena_mark(s->ctx->scratch);
        int32_t *last_tokens = b2_arena_take(s->ctx->scratch, (size_t)(last - first), sizeof *last_tokens, err);
        if (!last_tokens)
            return -1;
        for (int64_t b = first; b < last; b++)
            last_tokens[b - first] = (int32_t)(s->in->offsets[b + 1] - 1 - begin);
        if (prefill_rows(s, first, last, last_tokens, b2_rows(all, first, last - first), err) < 0)
            return -1;
        b2_arena_reset(s->ctx->scratch, mark);
        first = last;
    }
    s->allocations = b2_alloc_count();
    return check_logits(s, all, err);
}

/* Row r takes over its parent's suffix and adds the slot of this step's token. */
static void inherit_suffix(session *s, int64_t r, int64_t parent)
{
    int64_t ld = s->cache.steps + 1;
    int32_t *to = s->slots[1 - s->current] + r * ld;
    memcpy(to, s->slots[s->current] + parent * ld, (size_t)s->steps_taken * sizeof *to);
    to[s->steps_taken] = b2_kv_cache_slot(&s->cache, s->steps_taken, r);
}

static void fill_step_row(session *s, int64_t i, int64_t r)
{
    int64_t b = r / s->beams, ld = s->cache.steps + 1, mask_ld = s->longest + s->cache.steps;
    s->step_offsets[i] = (int32_t)i;
    s->step_positions[i] = s->next_position[b] + (int32_t)s->steps_taken;
    s->step_cache_rows[i] = b2_kv_cache_slot(&s->cache, s->steps_taken, r);
    s->step_starts[i] = s->starts[b];
    s->step_lens[i] = s->lens[b];
    s->step_suffix_lens[i] = (int32_t)s->steps_taken + 1;
    memcpy(s->step_slots + i * ld, s->slots[1 - s->current] + r * ld,
           (size_t)(s->steps_taken + 1) * sizeof *s->step_slots);
    if (!s->has_pads)
        return;
    memcpy(s->step_mask + i * mask_ld, s->in->mask + s->in->offsets[b], (size_t)s->lens[b]);
    memset(s->step_mask + i * mask_ld + s->lens[b], 1, (size_t)s->steps_taken + 1);
}

static int session_advance(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                           float *logits, b2_err *err)
{
    session *s = (session *)step;
    const b2_lm *lm = s->model->lm;
    if (s->steps_taken >= s->cache.steps)
        return b2_fail(err, B2_E_INTERNAL, "session: step %lld of %lld", (long long)s->steps_taken + 1,
                       (long long)s->cache.steps);
    for (int64_t i = 0; i < n; i++) {
        inherit_suffix(s, row[i], parent[i]);
        fill_step_row(s, i, row[i]);
    }
    s->step_offsets[n] = (int32_t)n;
    size_t mark = b2_arena_mark(s->ctx->scratch);
    float *x = b2_arena_take(s->ctx->scratch, (size_t)(n * lm->config.hidden_size), sizeof *x, err);
    cross_rows cross;
    if (!x || take_cross_rows(s, &cross, n, err) < 0)
        return -1;
    for (int64_t i = 0; s->source && i < n; i++)
        read_source(s, &cross, i, row[i] / s->beams);
    b2_lm_batch batch = {
        .x = b2_tensor_of(x, n, lm->config.hidden_size),
        .rows = n,
        .q_offsets = s->step_offsets,
        .positions = s->step_positions,
        .cache = &s->cache,
        .cache_rows = s->step_cache_rows,
        .prefix_starts = s->step_starts,
        .prefix_lens = s->step_lens,
        .suffix_slots = s->step_slots,
        .suffix_ld = s->cache.steps + 1,
        .suffix_lens = s->step_suffix_lens,
        .key_mask = s->has_pads ? s->step_mask : NULL,
        .key_mask_ld = s->longest + s->cache.steps,
        .cross = s->source ? &s->cross : NULL,
        .cross_starts = cross.starts,
        .cross_lens = cross.lens,
        .cross_mask = s->source_mask,
        .cross_mask_ld = s->longest_source,
        .logits = b2_tensor_of(logits, n, step->vocabulary),
    };
    if (lm->class_->embed(s->ctx, lm, batch.x, token, err) < 0 || lm->class_->forward(s->ctx, lm, &batch, err) < 0)
        return -1;
    b2_arena_reset(s->ctx->scratch, mark);
    s->current = 1 - s->current;
    s->steps_taken++;
    s->step_allocations = b2_alloc_count() - s->allocations;
    return check_logits(s, batch.logits, err);
}

/* Tokens that a search may append to its longest-running row, the last of which the model never reads; never more
 * than the model has positions for (a search that gets there fails with that message). */
static int64_t steps_needed(const b2_rows_in *in, const b2_generate_opts *opts, int64_t positions)
{
    int64_t most = 0;
    for (int64_t b = 0; b < in->rows; b++) {
        int64_t length = in->offsets[b + 1] - in->offsets[b];
        int64_t more = opts->max_new_tokens >= 0 ? opts->max_new_tokens : opts->max_length - length;
        most = more > most ? more : most;
    }
    most = most > positions + 1 ? positions + 1 : most;
    return most > 0 ? most - 1 : 0;
}

/* generate() upstream makes the positions itself, and not as OPT's forward does: a pad stands at 0 (not -1), and new
 * tokens count on from the last place of the prompt, even where that is a pad. Only pads at the end are changed by it:
 * nobody looks at the others. */
static void place_pads_for_search(session *s)
{
    const b2_rows_in *in = s->in;
    if (!s->has_pads)
        return;
    for (int64_t b = 0; b < in->rows; b++) {
        for (int64_t i = in->offsets[b]; i < in->offsets[b + 1]; i++)
            if (!in->mask[i])
                s->positions[i] = 0;
        s->next_position[b] = s->positions[in->offsets[b + 1] - 1] + 1;
    }
}

static int run_search(session *s, const int32_t *rule_ids, const b2_generate_opts *opts, b2_generated *out,
                      b2_session_stats *stats, b2_err *err)
{
    b2_prompts prompts = {s->in->rows, rule_ids, s->in->offsets, s->leading_pads};
    place_pads_for_search(s);
    if (reserve(s, s->running, err) < 0)
        return -1;
    if (b2_generate(out, &prompts, opts, &s->step, s->ctx->pool, s->ctx->cancel, err) < 0)
        return -1;
    stats->kv_bytes = b2_kv_cache_bytes(&s->cache, s->steps_taken);
    stats->step_allocations = (int64_t)s->step_allocations;
    return 0;
}

int b2_session_generate(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, const int32_t *rule_ids,
                        const b2_generate_opts *opts, b2_generated *out, b2_session_stats *stats, b2_err *err)
{
    b2_rows_in counted = *in;
    if (model->lm->class_->encode)
        counted = (b2_rows_in){.rows = in->rows, .offsets = in->decoder_offsets};
    b2_prompts prompts = {.rows = in->rows, .ids = rule_ids, .offsets = counted.offsets};
    if (b2_session_check(model, in, err) < 0 ||
        b2_generate_check(&prompts, opts, model->lm->config.vocab_size, err) < 0)
        return -1;
    session s = {.step = {model->lm->config.vocab_size, session_prefill, session_advance}};
    int status = session_open(&s, ctx, model, in, opts->num_beams,
                              steps_needed(&counted, opts, model->lm->config.max_position_embeddings), err);
    if (status == 0)
        status = run_search(&s, rule_ids, opts, out, stats, err);
    session_release(&s);
    return status;
}
