#include "model/places.h"

#include <string.h>

#include "core/memory.h"
#include "model/stage.h"

/* Tokens that are prefilled together: bounds the activations, changes no bit. Rows are never split. */
enum { PREFILL_TOKENS = 512, PREFILL_TOKENS_ON_DEVICE = 4096 };

struct b2_seat_rows {
    b2_prompt prompt;
    int32_t start;         /* first cache row of the region */
    int32_t length;        /* tokens of the prompt on the timeline */
    int32_t next_position; /* of the first new token */
    int32_t cross_start, cross_length;
    int64_t taken;         /* new tokens that its rows have */
    int64_t bytes;
    int now;               /* which of `slots` is valid */
};

/* ---- prompts ---- */

int64_t b2_prompt_length(const b2_prompt *prompt)
{
    if (prompt->decoder_ids)
        return prompt->decoder_length;
    return prompt->length + (prompt->prefix ? prompt->prefix->length : 0);
}

/* What is read into the timeline: all but the prefix. */
typedef struct stretch {
    const int32_t *ids;
    const uint8_t *mask;
    int64_t length;
} stretch;

static stretch own_tokens(const b2_prompt *prompt)
{
    if (prompt->decoder_ids)
        return (stretch){prompt->decoder_ids, prompt->decoder_mask, prompt->decoder_length};
    return (stretch){prompt->ids, prompt->mask, prompt->length};
}

static int64_t prefix_length(const b2_prompt *prompt)
{
    return prompt->prefix ? prompt->prefix->length : 0;
}

static int check_ids(const b2_blip2 *model, stretch s, int64_t row, const char *what, int32_t lowest, int64_t *features,
                     int64_t *seen, b2_err *err)
{
    int64_t vocabulary = model->lm->config.vocab_size;
    if (s.length < 1)
        return b2_fail(err, B2_E_VALUE, "row %lld: the %s is empty", (long long)row, what);
    for (int64_t i = 0; i < s.length; i++) {
        if (s.ids[i] < lowest || s.ids[i] >= vocabulary)
            return b2_fail(err, B2_E_INDEX, "row %lld: token id %d is outside the vocabulary of %lld", (long long)row,
                           (int)s.ids[i], (long long)vocabulary);
        *features += s.ids[i] == -1;
        *seen += !s.mask || s.mask[i];
    }
    return *seen > 0 ? 0 : b2_fail(err, B2_E_VALUE, "row %lld: every token is masked", (long long)row);
}

static int check_decoder(const b2_blip2 *model, const b2_prompt *prompt, int64_t row, b2_err *err)
{
    int64_t features = 0, seen = 0;
    if (!prompt->decoder_ids)
        return b2_fail(err, B2_E_VALUE, "row %lld: decoder_ids: the language model is an encoder-decoder, its decoder "
                       "needs ids to begin with", (long long)row);
    if (prompt->prefix)
        return b2_fail(err, B2_E_UNSUPPORTED, "row %lld: prefix: an encoder reads the whole prompt at once, a beginning "
                       "of it can not be kept", (long long)row);
    return check_ids(model, own_tokens(prompt), row, "decoder's prompt", 0, &features, &seen, err);
}

int b2_prompt_check(const b2_blip2 *model, const b2_prompt *prompt, int64_t row, b2_err *err)
{
    int64_t wanted = prompt->features.data ? prompt->features.rows : 0, features = 0, seen = 0;
    int64_t limit = model->lm->config.max_position_embeddings;
    stretch encoded = {prompt->ids, prompt->mask, prompt->length};
    if (check_ids(model, encoded, row, "prompt", -1, &features, &seen, err) < 0)
        return -1;
    if (features != wanted)
        return b2_fail(err, B2_E_VALUE, "row %lld: %lld image places in the prompt, expected %lld", (long long)row,
                       (long long)features, (long long)wanted);
    if (model->lm->class_->encode)
        return check_decoder(model, prompt, row, err);
    if (prompt->decoder_ids)
        return b2_fail(err, B2_E_VALUE, "row %lld: decoder_ids: the language model has no encoder", (long long)row);
    if (prompt->prefix && prompt->prefix->model != model)
        return b2_fail(err, B2_E_VALUE, "row %lld: prefix: it was made by another model", (long long)row);
    seen += prompt->prefix ? prompt->prefix->next_position : 0;
    if (seen > limit)
        return b2_fail(err, B2_E_VALUE, "row %lld: the prompt has %lld tokens, the language model has positions for %lld",
                       (long long)row, (long long)seen, (long long)limit);
    return 0;
}

/* ---- memory ---- */

static void *own(b2_places *p, size_t count, size_t size, b2_err *err)
{
    void *block = b2_alloc(count, size, "session", err);
    if (block)
        p->blocks[p->block_count++] = block;
    return block;
}

void b2_places_close(b2_places *p)
{
    b2_wait(p->ctx);
    for (int i = 0; i < p->block_count; i++)
        b2_free(p->blocks[i]);
    b2_kv_cache_release(&p->cache);
    b2_kv_cache_release(&p->cross);
    b2_memory_free(p->ctx->memory, p->logits);
    b2_memory_free(p->ctx->memory, p->list_there);
    b2_free(p->list_here);
    b2_turns_release(&p->turns, p->ctx);
}

static int own_tables(b2_places *p, b2_err *err)
{
    size_t rows = (size_t)(p->size.places * p->size.rows_per_place), suffix = rows * (size_t)p->size.steps;
    size_t tokens = (size_t)b2_max64(p->group_tokens, (int64_t)rows), number = sizeof(int32_t);
    int32_t **by_row[] = {&p->starts, &p->lens, &p->suffix_lens, &p->cross_starts, &p->cross_lens, &p->logit_rows};
    int32_t **by_token[] = {&p->ids, &p->positions, &p->cache_rows};
    int32_t **by_suffix[] = {&p->slots[0], &p->slots[1], &p->suffix_slots};
    for (size_t i = 0; i < 6; i++)
        if (!(*by_row[i] = own(p, rows, number, err)))
            return -1;
    for (size_t i = 0; i < 3; i++)
        if (!(*by_token[i] = own(p, tokens, number, err)) || !(*by_suffix[i] = own(p, suffix, number, err)))
            return -1;
    p->seats = own(p, (size_t)p->size.places, sizeof *p->seats, err);
    p->offsets = own(p, rows + 1, number, err);
    if (!p->seats || !p->offsets)
        return -1;
    if (!p->size.masked)
        return 0;
    p->mask = own(p, rows, (size_t)(p->size.longest + p->size.steps), err);
    p->cross_mask = own(p, rows, (size_t)p->size.longest_encoded, err);
    return p->mask && p->cross_mask ? 0 : -1;
}

static int reserve_scratch(b2_places *p, b2_err *err)
{
    const b2_lm *lm = p->model->lm;
    int64_t rows = p->size.places * p->size.rows_per_place, tokens = b2_max64(p->group_tokens, rows);
    int64_t logits = p->size.all_logits ? p->group_tokens : rows;
    int64_t keys = b2_max64(p->size.longest + p->size.steps, p->size.longest_encoded);
    size_t calls = lm->class_->scratch(p->ctx, lm, tokens, keys, logits);
    size_t encoding = lm->class_->encode ? lm->class_->encode_scratch(p->ctx, lm, tokens, p->size.longest_encoded) : 0;
    size_t x = b2_arena_cost((size_t)(tokens * lm->config.hidden_size), sizeof(float));
    size_t outer = b2_outer_bytes(p->ctx, logits, lm->config.vocab_size);
    return b2_ctx_reserve(p->ctx, x + outer + (calls > encoding ? calls : encoding), err);
}

static int prefill_step(b2_step *step, int64_t n, const int32_t *places, const b2_item *items, float *logits, b2_err *err);
static int advance_step(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                        float *logits, b2_err *err);
static void leave_step(b2_step *step, int32_t place);
static int plan_shortlists(b2_step *step, int64_t rows, const b2_choice *choice, b2_err *err);
static int make_shortlist(b2_step *step, int64_t n, b2_shortlist *list, b2_err *err);
static int fetch_logits(b2_step *step, int64_t row, float *logits, b2_err *err);

/* What keys and values are kept as: on a device as the weights that make them, quantised ones as float16. */
static b2_dtype kept_as(const b2_places *p)
{
    b2_dtype weights = p->model->dtypes[B2_PART_LANGUAGE];
    if (b2_on_host(p->ctx) || weights == B2_F32 || p->model->lm->kv_width % 2 != 0)
        return B2_F32;
    return weights == B2_BF16 ? B2_BF16 : B2_F16;
}

static int open_caches(b2_places *p, b2_err *err)
{
    const b2_lm *lm = p->model->lm;
    b2_dtype dtype = kept_as(p);
    const b2_places_size *size = &p->size;
    int64_t running = size->places * size->rows_per_place, most = INT32_MAX;
    if (running > most || size->longest > most || size->longest_encoded > most ||
        size->steps > most / running || size->longest + size->rows_per_place * size->steps > most / size->places)
        return b2_fail(err, B2_E_VALUE, "KV cache: %lld places for prompts of %lld tokens and %lld x %lld new ones are too "
                       "many", (long long)size->places, (long long)size->longest, (long long)size->rows_per_place,
                       (long long)size->steps);
    int64_t region = size->longest + size->rows_per_place * size->steps;
    if (b2_kv_cache_create(&p->cache, p->ctx->memory, dtype, lm->kv_layers, lm->kv_width, size->places * region, err) < 0)
        return -1;
    return size->longest_encoded == 0 ? 0
                                      : b2_kv_cache_create(&p->cross, p->ctx->memory, dtype, lm->kv_layers,
                                                           lm->kv_width, size->places * size->longest_encoded, err);
}

int b2_places_open(b2_places *p, b2_ctx *ctx, const b2_blip2 *model, const b2_places_size *size, b2_err *err)
{
    *p = (b2_places){.step = {.vocabulary = model->lm->config.vocab_size,
                              .prefill = prefill_step,
                              .advance = advance_step,
                              .leave = leave_step},
                     .ctx = ctx,
                     .model = model,
                     .size = *size};
    if (ctx->ops->shortlist) {
        p->step.plan = plan_shortlists;
        p->step.shortlist = make_shortlist;
        p->step.logits = fetch_logits;
    }
    int64_t longest = b2_max64(size->longest, size->longest_encoded);
    int64_t most = b2_on_host(ctx) ? PREFILL_TOKENS : PREFILL_TOKENS_ON_DEVICE;
    int64_t together = size->together < most ? size->together : most;
    p->group_tokens = b2_max64(longest, together);
    return open_caches(p, err) < 0 || own_tables(p, err) < 0 ? -1 : reserve_scratch(p, err);
}

/* ---- entering ---- */

static int64_t region(const b2_places *p)
{
    return p->size.longest + p->size.rows_per_place * p->size.steps;
}

static void count_bytes(b2_places *p, b2_seat_rows *seat, int64_t bytes)
{
    seat->bytes += bytes;
    p->bytes_used += bytes;
    p->bytes_most = b2_max64(p->bytes_most, p->bytes_used);
}

static int sit_down(b2_places *p, int32_t place, const b2_prompt *prompt, int64_t row, b2_err *err)
{
    int64_t length = b2_prompt_length(prompt), encoded = p->size.longest_encoded > 0 ? prompt->length : 0;
    if (length > p->size.longest || encoded > p->size.longest_encoded)
        return b2_fail(err, B2_E_VALUE, "row %lld: the prompt has %lld tokens, there is room for %lld", (long long)row,
                       (long long)(length > p->size.longest ? length : encoded),
                       (long long)(length > p->size.longest ? p->size.longest : p->size.longest_encoded));
    if ((prompt->mask || prompt->decoder_mask) && !p->size.masked)
        return b2_fail(err, B2_E_INTERNAL, "row %lld: a mask where none was announced", (long long)row);
    b2_seat_rows *seat = &p->seats[place];
    *seat = (b2_seat_rows){.prompt = *prompt,
                           .start = (int32_t)(place * region(p)),
                           .length = (int32_t)length,
                           .cross_start = (int32_t)(place * p->size.longest_encoded),
                           .cross_length = (int32_t)encoded};
    count_bytes(p, seat, length * b2_kv_cache_row_bytes(&p->cache) +
                             (encoded > 0 ? encoded * b2_kv_cache_row_bytes(&p->cross) : 0));
    if (!prompt->prefix)
        return 0;
    return b2_prefix_copy(p->ctx, &p->cache, seat->start, &prompt->prefix->cache, NULL, prompt->prefix->length, err);
}

/* forward() counts positions as the language model's forward() does: OPT cumsum(mask) * mask - 1, others pads too.
 * generate() upstream makes them itself, and not so: a pad stands at 0 (not -1), and new tokens count on from the last place
 * of the prompt, even where that is a pad. Only pads at the end are changed by it: nobody looks at the others. */
static void number_tokens(b2_places *p, b2_seat_rows *seat, int32_t *positions)
{
    stretch s = own_tokens(&seat->prompt);
    int counts_pads = p->size.all_logits && p->model->lm->class_->forward_counts_pads;
    int32_t next = seat->prompt.prefix ? (int32_t)seat->prompt.prefix->next_position : 0;
    for (int64_t i = 0; i < s.length; i++) {
        int real = !s.mask || s.mask[i] || counts_pads;
        positions[i] = real ? next++ : p->size.all_logits ? -1 : 0;
    }
    seat->next_position = positions[s.length - 1] + 1;
}

/* x [N, D]: token embeddings of p->ids, and the pictures' features where the id is -1. */
static int embed(b2_places *p, b2_tensor x, int64_t n, const int32_t *places, b2_err *err)
{
    const b2_lm *lm = p->model->lm;
    if (lm->class_->embed(p->ctx, lm, x, p->ids, err) < 0)
        return -1;
    for (int64_t g = 0; g < n; g++) {
        b2_tensor features = p->seats[places[g]].prompt.features;
        int64_t taken = 0, count;
        for (int64_t i = p->offsets[g]; i < p->offsets[g + 1]; i += count > 0 ? count : 1) {
            for (count = 0; i + count < p->offsets[g + 1] && p->ids[i + count] == -1;)
                count++;
            if (count > 0 &&
                b2_upload_rows(p->ctx, b2_rows(x, i, count), b2_rows(features, taken, count), err) < 0)
                return -1;
            taken += count;
        }
    }
    return 0;
}

static void fill_mask(uint8_t *to, int64_t prefix, stretch s)
{
    memset(to, 1, (size_t)(prefix + s.length));
    if (s.mask)
        memcpy(to + prefix, s.mask, (size_t)s.length);
}

/* The prompts of a group through the encoder, into the cross cache. */
static int encode_group(b2_places *p, int64_t n, const int32_t *places, b2_err *err)
{
    const b2_lm *lm = p->model->lm;
    int32_t tokens = 0;
    for (int64_t g = 0; g < n; g++) {
        const b2_seat_rows *seat = &p->seats[places[g]];
        stretch s = {seat->prompt.ids, seat->prompt.mask, seat->prompt.length};
        p->offsets[g] = tokens;
        if (p->size.masked)
            fill_mask(p->cross_mask + g * p->size.longest_encoded, 0, s);
        for (int64_t i = 0; i < s.length; i++, tokens++) {
            p->ids[tokens] = s.ids[i];
            p->cache_rows[tokens] = seat->cross_start + (int32_t)i;
        }
    }
    p->offsets[n] = tokens;
    b2_ctx_mark mark = b2_ctx_marked(p->ctx);
    float *x = b2_arena_take(p->ctx->activations, (size_t)(tokens * lm->config.hidden_size), sizeof *x, err);
    if (!x)
        return -1;
    b2_lm_batch batch = {
        .x = b2_tensor_of(x, tokens, lm->config.hidden_size),
        .rows = n,
        .q_offsets = p->offsets,
        .cache = &p->cross,
        .cache_rows = p->cache_rows,
        .key_mask = p->size.masked ? p->cross_mask : NULL,
        .key_mask_ld = p->size.longest_encoded,
    };
    if (embed(p, batch.x, n, places, err) < 0 || lm->class_->encode(p->ctx, lm, &batch, err) < 0)
        return -1;
    b2_ctx_reset(p->ctx, mark);
    return 0;
}

static void fill_cross(b2_places *p, int64_t i, const b2_seat_rows *seat)
{
    p->cross_starts[i] = seat->cross_start;
    p->cross_lens[i] = seat->cross_length;
    if (p->size.masked && p->size.longest_encoded > 0)
        fill_mask(p->cross_mask + i * p->size.longest_encoded, 0,
                  (stretch){seat->prompt.ids, seat->prompt.mask, seat->prompt.length});
}

/* The tables of a group's own tokens; returns how many they are. */
static int32_t lay_out_group(b2_places *p, int64_t n, const int32_t *places)
{
    int32_t tokens = 0;
    for (int64_t g = 0; g < n; g++) {
        b2_seat_rows *seat = &p->seats[places[g]];
        stretch s = own_tokens(&seat->prompt);
        int64_t before = prefix_length(&seat->prompt);
        p->offsets[g] = tokens;
        p->starts[g] = seat->start;
        p->lens[g] = seat->length;
        number_tokens(p, seat, p->positions + tokens);
        fill_cross(p, g, seat);
        if (p->size.masked)
            fill_mask(p->mask + g * (p->size.longest + p->size.steps), before, s);
        for (int64_t i = 0; i < s.length; i++, tokens++) {
            p->ids[tokens] = s.ids[i];
            p->cache_rows[tokens] = seat->start + (int32_t)(before + i);
        }
        p->logit_rows[g] = tokens - 1;
    }
    p->offsets[n] = tokens;
    return tokens;
}

static void name_cross(const b2_places *p, b2_lm_batch *batch)
{
    if (p->size.longest_encoded == 0)
        return;
    batch->cross = &p->cross;
    batch->cross_starts = p->cross_starts;
    batch->cross_lens = p->cross_lens;
    batch->cross_mask = p->size.masked ? p->cross_mask : NULL;
    batch->cross_mask_ld = p->size.longest_encoded;
}

static int check_logits(b2_ctx *ctx, b2_tensor logits, b2_err *err)
{
    return b2_note_finite(ctx, "language_model", B2_LOGITS, logits, err);
}

/* *inner: where the model makes the logits that are wanted at `outer`. */
static int take_logits(b2_places *p, b2_tensor *inner, b2_tensor outer, b2_err *err)
{
    *inner = outer;
    return p->logits_stay ? 0 : b2_room_for(p->ctx, inner, outer, err);
}

/* The n rows of a call of the step. */
static b2_tensor step_logits(b2_places *p, int64_t n, float *logits)
{
    p->logits_stay = !logits;
    return b2_tensor_of(logits ? logits : p->logits, n, p->step.vocabulary);
}

/* Prompts that sit at `places` [n] through the model. */
static int read_group(b2_places *p, int64_t n, const int32_t *places, b2_tensor outer, b2_err *err)
{
    const b2_lm *lm = p->model->lm;
    if (p->size.longest_encoded > 0 && encode_group(p, n, places, err) < 0)
        return -1;
    int32_t tokens = lay_out_group(p, n, places);
    b2_ctx_mark mark = b2_ctx_marked(p->ctx);
    b2_tensor logits;
    float *x = b2_arena_take(p->ctx->activations, (size_t)(tokens * lm->config.hidden_size), sizeof *x, err);
    if (!x || take_logits(p, &logits, outer, err) < 0)
        return -1;
    b2_lm_batch batch = {
        .x = b2_tensor_of(x, tokens, lm->config.hidden_size),
        .rows = n,
        .q_offsets = p->offsets,
        .positions = p->positions,
        .cache = &p->cache,
        .cache_rows = p->cache_rows,
        .prefix_starts = p->starts,
        .prefix_lens = p->lens,
        .key_mask = p->size.masked ? p->mask : NULL,
        .key_mask_ld = p->size.longest + p->size.steps,
        .logit_rows = p->size.all_logits ? NULL : p->logit_rows,
        .logits = logits,
    };
    name_cross(p, &batch);
    if (embed(p, batch.x, n, places, err) < 0 || lm->class_->forward(p->ctx, lm, &batch, err) < 0 ||
        (!p->size.all_logits && logits.data && check_logits(p->ctx, logits, err) < 0) ||
        (!p->logits_stay && b2_hand_over(p->ctx, outer, logits, err) < 0))
        return -1;
    b2_ctx_reset(p->ctx, mark);
    return 0;
}

/* As many of the n places as fit in one group, at least one; *tokens: theirs on the timeline. */
static int64_t group_size(const b2_places *p, int64_t n, const int32_t *places, int64_t *tokens)
{
    int64_t count = 0, encoded = 0;
    for (*tokens = 0; count < n; count++) {
        const b2_seat_rows *seat = &p->seats[places[count]];
        int64_t more = own_tokens(&seat->prompt).length;
        if (count > 0 && (*tokens + more > p->group_tokens || encoded + seat->cross_length > p->group_tokens))
            break;
        *tokens += more;
        encoded += seat->cross_length;
    }
    return count;
}

static int read_all(b2_places *p, int64_t n, const int32_t *places, b2_tensor logits, b2_err *err)
{
    for (int64_t first = 0, row = 0, tokens = 0; first < n;) {
        int64_t count = group_size(p, n - first, places + first, &tokens);
        int64_t rows = !logits.data ? 0 : p->size.all_logits ? tokens : count;
        if (read_group(p, count, places + first, b2_rows(logits, row, rows), err) < 0)
            return -1;
        row += rows;
        first += count;
    }
    return 0;
}

int b2_places_prefill(b2_places *p, int64_t n, const b2_prompt *prompts, b2_tensor logits, b2_err *err)
{
    for (int32_t i = 0; i < n; i++) {
        if (sit_down(p, i, &prompts[i], i, err) < 0)
            return -1;
        p->suffix_lens[i] = i; /* free here: the list of places */
    }
    return read_all(p, n, p->suffix_lens, logits, err);
}

static int prefill_step(b2_step *step, int64_t n, const int32_t *places, const b2_item *items, float *logits, b2_err *err)
{
    b2_places *p = (b2_places *)step;
    b2_tensor all = step_logits(p, n, logits);
    b2_turns_forget(&p->turns);
    p->rows_now = 0;
    for (int64_t i = 0; i < n; i++)
        if (b2_prompt_check(p->model, items[i].prompt, items[i].index, err) < 0 ||
            sit_down(p, places[i], items[i].prompt, items[i].index, err) < 0)
            return -1;
    if (read_all(p, n, places, all, err) < 0)
        return -1;
    p->allocations_seen = b2_alloc_count();
    return 0;
}

/* ---- going on ---- */

/* Where running row j of the place stores its new token number `step`. */
static int32_t slot_of(const b2_places *p, const b2_seat_rows *seat, int64_t step, int64_t j)
{
    return seat->start + (int32_t)(p->size.longest + step * p->size.rows_per_place + j);
}

/* Row r takes over its parent's suffix and adds the slot of this step's token. */
static void inherit_suffix(b2_places *p, const b2_seat_rows *seat, int64_t r, int64_t parent)
{
    int64_t ld = p->size.steps;
    int32_t *to = p->slots[!seat->now] + r * ld;
    memcpy(to, p->slots[seat->now] + parent * ld, (size_t)seat->taken * sizeof *to);
    to[seat->taken] = slot_of(p, seat, seat->taken, r % p->size.rows_per_place);
}

/* Everything that packed row i, running row r, reads. */
static void fill_row(b2_places *p, int64_t i, int64_t r, const b2_seat_rows *seat)
{
    int64_t ld = p->size.steps, mask_ld = p->size.longest + ld, suffix = seat->taken + 1;
    p->offsets[i] = (int32_t)i;
    p->positions[i] = seat->next_position + (int32_t)seat->taken;
    p->cache_rows[i] = slot_of(p, seat, seat->taken, r % p->size.rows_per_place);
    p->starts[i] = seat->start;
    p->lens[i] = seat->length;
    p->suffix_lens[i] = (int32_t)suffix;
    memcpy(p->suffix_slots + i * ld, p->slots[!seat->now] + r * ld, (size_t)suffix * sizeof *p->suffix_slots);
    fill_cross(p, i, seat);
    if (!p->size.masked)
        return;
    fill_mask(p->mask + i * mask_ld, prefix_length(&seat->prompt), own_tokens(&seat->prompt));
    memset(p->mask + i * mask_ld + seat->length, 1, (size_t)suffix);
}

/* The places whose rows went on have one token more. */
static void count_step(b2_places *p, int64_t n, const int32_t *row)
{
    for (int64_t i = 0; i < n; i++) {
        int64_t place = row[i] / p->size.rows_per_place;
        b2_seat_rows *seat = &p->seats[place];
        count_bytes(p, seat, b2_kv_cache_row_bytes(&p->cache));
        if (i + 1 < n && row[i + 1] / p->size.rows_per_place == place)
            continue;
        seat->taken++;
        seat->now = !seat->now;
    }
}

static int lay_out_step(b2_places *p, int64_t n, const int32_t *row, const int32_t *parent, b2_err *err)
{
    int64_t positions = p->model->lm->config.max_position_embeddings;
    for (int64_t i = 0; i < n; i++) {
        const b2_seat_rows *seat = &p->seats[row[i] / p->size.rows_per_place];
        if (seat->taken >= p->size.steps)
            return b2_fail(err, B2_E_INTERNAL, "session: step %lld of %lld", (long long)seat->taken + 1,
                           (long long)p->size.steps);
        if (seat->next_position + seat->taken >= positions)
            return b2_fail(err, B2_E_VALUE, "the sequence has %lld tokens, the language model has positions for %lld",
                           (long long)(seat->next_position + seat->taken) + 1, (long long)positions);
        inherit_suffix(p, seat, row[i], parent[i]);
        fill_row(p, i, row[i], seat);
    }
    p->offsets[n] = (int32_t)n;
    return 0;
}

/* One step of the model: what its operations are given, and nothing besides. */
typedef struct step_call {
    const b2_lm *lm;
    const int32_t *ids; /* [n] */
    b2_lm_batch batch;
    b2_kv_cache cache, cross; /* what `batch` points to, for comparing */
    b2_choice choice;         /* k is 0: it does not choose */
    b2_choice_tables tables;
} step_call;

static int run_step(b2_ctx *ctx, void *argument, b2_err *err)
{
    const step_call *call = argument;
    const b2_lm *lm = call->lm;
    b2_lm_batch batch = call->batch;
    if (lm->class_->embed(ctx, lm, batch.x, call->ids, err) < 0 || lm->class_->forward(ctx, lm, &batch, err) < 0 ||
        check_logits(ctx, batch.logits, err) < 0)
        return -1;
    return call->choice.k > 0 ? b2_choose(ctx, &call->choice, &call->tables, batch.logits, err) : 0;
}

static void fill_call(b2_places *p, step_call *call, int64_t n, b2_tensor x, b2_tensor logits)
{
    memset(call, 0, sizeof *call); /* what lies between the fields is compared too */
    b2_lm_batch *batch = &call->batch;
    call->lm = p->model->lm;
    call->ids = p->ids;
    call->cache = p->cache;
    call->cross = p->cross;
    batch->x = x;
    batch->rows = n;
    batch->q_offsets = p->offsets;
    batch->positions = p->positions;
    batch->cache = &p->cache;
    batch->cache_rows = p->cache_rows;
    batch->prefix_starts = p->starts;
    batch->prefix_lens = p->lens;
    batch->suffix_slots = p->suffix_slots;
    batch->suffix_ld = p->size.steps;
    batch->suffix_lens = p->suffix_lens;
    batch->key_mask = p->size.masked ? p->mask : NULL;
    batch->key_mask_ld = p->size.longest + p->size.steps;
    batch->logits = logits;
    name_cross(p, batch);
}

/* What the step reads that it writes for the next one. */
static void fill_choice(b2_places *p, step_call *call)
{
    b2_choice_tables *t = &call->tables;
    memcpy(&call->choice, p->turns.choice, sizeof call->choice);
    t->ids = p->ids;
    t->positions = p->positions;
    t->cache_rows = p->cache_rows;
    t->suffix_lens = p->suffix_lens;
    t->suffix_slots = p->suffix_slots;
    t->suffix_ld = p->size.steps;
    t->key_mask = p->size.masked ? p->mask : NULL;
    t->key_mask_ld = p->size.longest + p->size.steps;
    t->prefix_lens = p->lens;
    t->cache_step = (int32_t)p->size.rows_per_place;
    t->turns = p->turns.counters;
    t->log = p->turns.log_there;
    t->spare = p->turns.spare;
}

/* The step that is laid out for n rows, and up to turns.launched - 1 that follow; 0 there: it alone, choosing nothing. */
static int run_laid_out(b2_places *p, int64_t n, b2_tensor outer, b2_err *err)
{
    b2_ctx *ctx = p->ctx;
    b2_tensor x, inner;
    step_call call;
    int repeats = 0;
    b2_ctx_mark mark = b2_ctx_marked(ctx);
    if (b2_stage_take(ctx, &x, n, p->model->lm->config.hidden_size, err) < 0 || take_logits(p, &inner, outer, err) < 0)
        return -1;
    fill_call(p, &call, n, x, inner);
    if (p->turns.launched > 0)
        fill_choice(p, &call);
    b2_step_shape shape = {.key = &call, .bytes = sizeof call, .turns = (int)p->turns.launched, .repeats = &repeats};
    b2_rows_are before = ctx->rows_are;
    ctx->rows_are = B2_ROWS_APART;
    int status = b2_step_run(ctx, shape, run_step, &call, err);
    ctx->rows_are = before;
    if (!repeats)
        b2_turns_forget(&p->turns);
    if (status < 0 || (!p->logits_stay && b2_hand_over(ctx, outer, inner, err) < 0))
        return -1;
    b2_ctx_reset(ctx, mark);
    return 0;
}

/* Steps that all of these rows have room for. */
static int64_t room_of(const b2_places *p, int64_t n, const int32_t *row)
{
    int64_t room = p->size.steps, positions = p->model->lm->config.max_position_embeddings;
    for (int64_t i = 0; i < n; i++) {
        const b2_seat_rows *seat = &p->seats[row[i] / p->size.rows_per_place];
        room = b2_min64(room, b2_min64(p->size.steps - seat->taken, positions - seat->next_position - seat->taken));
    }
    return room;
}

static int advance_step(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                        float *logits, b2_err *err)
{
    b2_places *p = (b2_places *)step;
    b2_tensor outer = step_logits(p, n, logits);
    if (lay_out_step(p, n, row, parent, err) < 0)
        return -1;
    memcpy(p->ids, token, (size_t)n * sizeof *token);
    p->rows_now = n;
    if (!b2_turns_have(&p->turns, n, row, parent, token)) {
        b2_turns_begin(&p->turns, n, row, step->alone ? b2_turns_wanted(&p->turns, n, room_of(p, n, row)) : 0);
        if (run_laid_out(p, n, outer, err) < 0)
            return -1;
    }
    count_step(p, n, row);
    uint64_t allocations = b2_alloc_count();
    p->step_allocations += (int64_t)(allocations - p->allocations_seen);
    p->allocations_seen = allocations;
    return 0;
}

static void leave_step(b2_step *step, int32_t place)
{
    b2_places *p = (b2_places *)step;
    p->bytes_used -= p->seats[place].bytes;
    p->seats[place].bytes = 0;
}

/* ---- logits that stay ---- */

static int plan_shortlists(b2_step *step, int64_t rows, const b2_choice *choice, b2_err *err)
{
    b2_places *p = (b2_places *)step;
    size_t bytes = b2_shortlist_bytes(rows, choice->k, choice->listed_ld);
    p->logits = b2_memory_alloc(p->ctx->memory, (size_t)(rows * step->vocabulary), sizeof *p->logits, "logits", err);
    p->list_there = b2_memory_alloc(p->ctx->memory, bytes, 1, "shortlists", err);
    p->list_here = b2_alloc(bytes, 1, "shortlists", err);
    if (!p->logits || !p->list_there || !p->list_here)
        return -1;
    return b2_turns_plan(&p->turns, p->ctx, choice, rows, p->size.steps, err);
}

/* What is not finite may come behind the end of every row, where nobody has asked for it: then this step goes alone. */
static int fetch_turns(b2_places *p, b2_err *err)
{
    b2_err why = {0};
    int status = b2_turns_fetch(&p->turns, p->ctx, &why);
    if (status < 0 && why.code == B2_E_NUMERIC && p->turns.launched > 1) {
        why = (b2_err){0};
        b2_turns_begin(&p->turns, p->rows_now, p->turns.row, 1);
        status = run_laid_out(p, p->rows_now, step_logits(p, p->rows_now, NULL), &why);
        status = status < 0 || p->turns.launched == 0 ? status : b2_turns_fetch(&p->turns, p->ctx, &why);
    }
    if (status < 0)
        *err = why;
    return status;
}

static int make_shortlist(b2_step *step, int64_t n, b2_shortlist *list, b2_err *err)
{
    b2_places *p = (b2_places *)step;
    b2_tensor logits = b2_tensor_of(p->logits, n, step->vocabulary);
    if (p->turns.launched > 0 && fetch_turns(p, err) < 0)
        return -1;
    if (p->turns.launched > 0)
        return b2_turns_list(&p->turns, n, list, p->list_here, err);
    if (b2_make_shortlist(p->ctx, list, logits, p->list_there, p->list_here, err) < 0)
        return -1;
    if (p->rows_now > 0)
        b2_turns_waited(&p->turns, 1);
    return 0;
}

/* Where a step is not the last of its run its logits are gone; it is done again. */
static int fetch_logits(b2_step *step, int64_t row, float *logits, b2_err *err)
{
    b2_places *p = (b2_places *)step;
    int64_t at = b2_turns_logits(&p->turns, row);
    if (at < 0) {
        b2_turns_forget(&p->turns);
        if (run_laid_out(p, p->rows_now, step_logits(p, p->rows_now, NULL), err) < 0)
            return -1;
        at = row;
    }
    return b2_download(p->ctx, logits, p->logits + at * step->vocabulary, (size_t)step->vocabulary * sizeof *logits, err);
}

/* ---- keeping ---- */

/* The cache rows of everything that has a key: the prompt's, then those of the new tokens but the last. */
static void list_rows(const b2_places *p, const b2_seat_rows *seat, int32_t *rows, int64_t kept, const int32_t *beams,
                      int32_t row)
{
    for (int32_t i = 0; i < seat->length; i++)
        rows[i] = seat->start + i;
    /* The row that token i was given to is the one that token i + 1 was appended to. */
    for (int64_t i = 0; i < kept; i++)
        rows[seat->length + i] = slot_of(p, seat, i, beams ? beams[i + 1] : row);
}

static void list_ids(const b2_seat_rows *seat, b2_prefix *prefix, const int32_t *rules, const int32_t *ids, int64_t kept)
{
    const b2_prefix *before = seat->prompt.prefix;
    int64_t first = before ? before->length : 0;
    if (before)
        memcpy(prefix->ids, before->ids, (size_t)first * sizeof *prefix->ids);
    memcpy(prefix->ids + first, seat->prompt.ids, (size_t)seat->prompt.length * sizeof *prefix->ids);
    memcpy(prefix->rule_ids, rules, (size_t)seat->length * sizeof *prefix->rule_ids);
    if (kept == 0)
        return;
    memcpy(prefix->ids + seat->length, ids, (size_t)kept * sizeof *prefix->ids);
    memcpy(prefix->rule_ids + seat->length, ids, (size_t)kept * sizeof *prefix->rule_ids);
}

int b2_prompt_check_keep(const b2_prompt *prompt, int64_t row, b2_err *err)
{
    if (prompt->decoder_ids)
        return b2_fail(err, B2_E_UNSUPPORTED, "row %lld: prefix: an encoder reads the whole prompt at once, a beginning of it "
                       "can not be kept", (long long)row);
    if (prompt->mask)
        return b2_fail(err, B2_E_VALUE, "row %lld: prefix: a prompt with a mask can not be kept", (long long)row);
    return 0;
}

int b2_places_keep(b2_prefix **kept, b2_places *p, int32_t place, const int32_t *rules, const int32_t *ids, int64_t length,
                   const int32_t *beams, int32_t row, b2_err *err)
{
    const b2_seat_rows *seat = &p->seats[place];
    int64_t more = length > 0 ? length - 1 : 0, all = seat->length + more;
    if (b2_prompt_check_keep(&seat->prompt, place, err) < 0)
        return -1;
    int32_t *rows = b2_alloc((size_t)all, sizeof *rows, "rows of a prefix", err);
    b2_prefix *prefix = rows ? b2_prefix_create(p->model, &p->cache, all, err) : NULL;
    int status = -1;
    if (prefix) {
        list_rows(p, seat, rows, more, beams, row);
        list_ids(seat, prefix, rules, ids, more);
        prefix->next_position = seat->next_position + more;
        status = b2_prefix_copy(p->ctx, &prefix->cache, 0, &p->cache, rows, all, err);
    }
    b2_free(rows);
    if (status < 0) {
        b2_wait(p->ctx);
        b2_prefix_release(prefix);
    } else {
        *kept = prefix;
    }
    return status;
}
