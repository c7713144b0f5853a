/* The loop of every search: items enter free places, are prefilled, all running rows go on together by one token, items
 * that are finished leave. What is done to the scores between the model and the choice is here, in transformers' order:
 *
 *     [log_softmax in beam search]  rules and warpers, or hooks->process  [+ sums of the beams]  choice  hooks->stop, put
 *
 * With hooks all rows begin together and go on until the last is finished, as transformers' do. */
#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "generate/ahead.h"
#include "generate/few.h"
#include "generate/scores.h"
#include "generate/search.h"

enum { SCORES_WORTH_THREADS = 32768 };

int b2_search_tiles(const b2_search *search, int64_t tiles, int64_t scores_per_tile, b2_tile_fn fn, b2_err *err)
{
    if (tiles > SCORES_WORTH_THREADS / scores_per_tile)
        return b2_pool_run(search->pool, tiles, fn, (void *)search, search->cancel, err);
    for (int64_t i = 0; i < tiles; i++)
        fn((void *)search, i, 0);
    return 0;
}

int b2_search_forbidden(int64_t index, int64_t step, b2_err *err)
{
    return b2_fail(err, B2_E_VALUE, "row %lld at step %lld: every token is forbidden (suppress_tokens, bad_words_ids, "
                   "no_repeat_ngram_size and min_length leave none)", (long long)index, (long long)step);
}

int b2_search_too_long(int64_t index, int64_t length, const b2_generate_opts *opts, b2_err *err)
{
    return b2_fail(err, B2_E_VALUE, "max_length: prompt %lld has %lld tokens already, max_length is %lld; raise it or set "
                   "max_new_tokens", (long long)index, (long long)length, (long long)opts->max_length);
}

/* ---- memory ---- */

static int reserve_rows(b2_search *s, b2_err *err)
{
    size_t rows = (size_t)(s->size.places * s->rows_per_seat);
    s->row = b2_alloc(rows, sizeof *s->row, "search rows", err);
    s->step_parent = b2_alloc(rows, sizeof *s->step_parent, "search parents", err);
    s->step_token = b2_alloc(rows, sizeof *s->step_token, "search tokens", err);
    s->broken = b2_alloc_zeroed(rows, sizeof *s->broken, "search flags", err);
    s->scores = b2_alloc(rows, (size_t)s->step->vocabulary * sizeof *s->scores, "search scores", err);
    s->scratch = b2_alloc(rows, (size_t)s->stride, "search scratch", err);
    s->alive = b2_alloc_zeroed(rows, sizeof *s->alive, "search flags", err);
    s->parent = b2_alloc(rows, sizeof *s->parent, "search parents", err);
    s->token = b2_alloc(rows, sizeof *s->token, "search tokens", err);
    s->shown = b2_alloc(rows, sizeof *s->shown, "search tokens", err);
    for (int i = 0; i < (s->opts->num_beams > 1 ? 2 : 1); i++)
        if (!(s->said[i] = b2_alloc(rows, (size_t)s->width * sizeof **s->said, "new tokens", err)))
            return -1;
    return s->row && s->step_parent && s->step_token && s->broken && s->scores && s->scratch && s->alive && s->parent &&
                   s->token && s->shown
               ? 0
               : -1;
}

static int reserve(b2_search *s, b2_err *err)
{
    size_t places = (size_t)s->size.places;
    s->seats = b2_alloc_zeroed(places, sizeof *s->seats, "places", err);
    s->entering = b2_alloc(places, sizeof *s->entering, "places", err);
    s->group = b2_alloc(places, sizeof *s->group, "places", err);
    s->lengths = b2_alloc((size_t)s->rows_per_seat, sizeof *s->lengths, "lengths", err);
    s->final_scores = b2_alloc_zeroed((size_t)s->rows_per_seat, sizeof *s->final_scores, "final scores", err);
    if (!s->seats || !s->entering || !s->group || !s->lengths || !s->final_scores || reserve_rows(s, err) < 0)
        return -1;
    return s->chooser->reserve(s, err) < 0 ? -1 : b2_few_reserve(s, err);
}

static void release(b2_search *s)
{
    s->chooser->release(s);
    b2_few_release(s);
    b2_ahead_release(s);
    void *blocks[] = {s->seats,  s->entering, s->group, s->row,   s->step_parent, s->step_token, s->broken,
                      s->scores, s->scratch,  s->alive, s->parent, s->token,      s->said[0],    s->said[1],
                      s->lengths, s->final_scores, s->shown};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        b2_free(blocks[i]);
}

/* ---- scores ---- */

/* 0 where the row is broken. */
static int prepare_row(b2_search *s, int64_t i)
{
    int64_t vocabulary = s->step->vocabulary;
    float *scores = b2_search_scores(s, i);
    int broken = b2_scores_broken(scores, vocabulary);
    s->broken[i] = broken && !s->opts->remove_invalid_values;
    if (s->broken[i] || s->opts->num_beams == 1)
        return !s->broken[i];
    if (broken) /* one NaN or +Inf makes the whole softmax NaN */
        b2_scores_fill(scores, vocabulary, NAN);
    else
        b2_scores_log_softmax(scores, vocabulary);
    return 1;
}

static void prepare_tile(void *argument, int64_t i, int worker)
{
    (void)worker;
    prepare_row(argument, i);
}

void b2_search_rules(b2_search *s, int64_t i)
{
    const b2_seat *seat = &s->seats[s->row[i] / s->rows_per_seat];
    b2_history history = {.prompt = seat->item.ids,
                          .prompt_length = seat->item.length,
                          .skip = seat->item.skip,
                          .made = b2_search_said(s, s->row[i]),
                          .made_length = seat->step};
    b2_rules_apply(b2_search_scores(s, i), s->step->vocabulary, &history, s->opts, s->scratch + i * s->stride);
}

static void rules_tile(void *argument, int64_t i, int worker)
{
    (void)worker;
    b2_search *s = argument;
    if (prepare_row(s, i))
        b2_search_rules(s, i);
}

static void add_tile(void *argument, int64_t i, int worker)
{
    (void)worker;
    b2_search *s = argument;
    if (!s->broken[i])
        b2_scores_add(b2_search_scores(s, i), s->step->vocabulary, s->chooser->addend(s, i));
}

void b2_search_score_row(b2_search *s, int64_t i)
{
    rules_tile(s, i, 0);
    if (s->chooser->addend)
        add_tile(s, i, 0);
}

static void score_tile(void *argument, int64_t i, int worker)
{
    rules_tile(argument, i, worker);
    b2_search *s = argument;
    if (s->chooser->addend && s->rows == s->group_count * s->rows_per_seat)
        add_tile(argument, i, worker);
}

/* After a prefill `scores` holds one row per item, and all rows of the item see it. Backwards, because the rows of an
 * item lie at or behind the one they come from. */
static void spread(b2_search *s)
{
    int64_t width = s->rows_per_seat, vocabulary = s->step->vocabulary;
    if (width == 1)
        return;
    for (int64_t k = s->group_count - 1; k >= 0; k--)
        for (int64_t j = width - 1; j >= 0; j--) {
            memmove(b2_search_scores(s, k * width + j), b2_search_scores(s, k), (size_t)vocabulary * sizeof *s->scores);
            s->row[k * width + j] = (int32_t)(s->group[k] * width + j);
            s->broken[k * width + j] = s->broken[k];
        }
    s->rows = s->group_count * width;
}

/* A row that has ended and goes on only to be shown may hold anything. */
static int check_rows(const b2_search *s, b2_err *err)
{
    for (int64_t i = 0; i < s->rows; i++) {
        const b2_seat *seat = &s->seats[s->row[i] / s->rows_per_seat];
        if (!s->broken[i] || seat->over)
            continue;
        if (s->opts->num_beams > 1)
            return b2_fail(err, B2_E_NUMERIC, "logits of row %lld, beam %lld at step %lld: NaN or Inf",
                           (long long)seat->item.index, (long long)(s->row[i] % s->rows_per_seat), (long long)seat->step);
        return b2_fail(err, B2_E_NUMERIC, "logits of row %lld at step %lld: NaN or Inf", (long long)seat->item.index,
                       (long long)seat->step);
    }
    return 0;
}

/* With hooks the group is all places, and rows stand in order. */
static b2_view view_of(const b2_search *s)
{
    const b2_seat *first = &s->seats[s->group[0]];
    return (b2_view){.rows = s->rows,
                     .rows_per_item = s->rows_per_seat,
                     .length = first->step,
                     .ids = s->said[first->now],
                     .ld = s->width};
}

/* What a callable has left may be anything. An infinity is the largest for argmax, but neither draws nor sums of beams can
 * do with it: with -Inf it makes NaN. */
static int check_processed(const b2_search *s, b2_err *err)
{
    int64_t vocabulary = s->step->vocabulary;
    int sums_up = s->opts->do_sample || s->opts->num_beams > 1;
    for (int64_t i = 0; i < s->rows; i++)
        for (int64_t v = 0; v < vocabulary; v++) {
            float score = b2_search_scores(s, i)[v];
            if (isnan(score) || (sums_up && score == INFINITY))
                return b2_fail(err, B2_E_NUMERIC, "logits_processor: row %lld, token %lld: %s in the scores it returned",
                               (long long)i, (long long)v, isnan(score) ? "NaN" : "Inf");
        }
    return 0;
}

/* As score(), with somebody looking on. */
static int score_with_hooks(b2_search *s, int fresh, b2_err *err)
{
    b2_hooks *hooks = s->opts->hooks;
    int64_t vocabulary = s->step->vocabulary;
    if (fresh)
        spread(s);
    b2_view view = view_of(s);
    if (hooks->logits && hooks->logits(hooks, s->rows, s->scores, err) < 0)
        return -1;
    if (b2_search_tiles(s, s->rows, vocabulary, hooks->process ? prepare_tile : rules_tile, err) < 0 ||
        check_rows(s, err) < 0)
        return -1;
    if (hooks->process && (hooks->process(hooks, &view, s->scores, err) < 0 || check_processed(s, err) < 0))
        return -1;
    if (hooks->scores && hooks->scores(hooks, s->rows, s->scores, err) < 0)
        return -1;
    return s->chooser->addend ? b2_search_tiles(s, s->rows, vocabulary, add_tile, err) : 0;
}

static int score(b2_search *s, int fresh, b2_err *err)
{
    if (s->few)
        return b2_few_score(s, fresh, err);
    if (s->opts->hooks)
        return score_with_hooks(s, fresh, err);
    if (b2_search_tiles(s, s->rows, s->step->vocabulary, score_tile, err) < 0 || check_rows(s, err) < 0)
        return -1;
    if (!fresh || s->rows_per_seat == 1)
        return 0;
    spread(s);
    return s->chooser->addend ? b2_search_tiles(s, s->rows, s->step->vocabulary, add_tile, err) : 0;
}

/* ---- coming and going ---- */

static int64_t seats_taken(const b2_search *s)
{
    int64_t taken = 0;
    for (int64_t p = 0; p < s->size.places; p++)
        taken += s->seats[p].taken;
    return taken;
}

static int sit_down(b2_search *s, int32_t place, const b2_item *item, b2_err *err)
{
    int64_t limit = b2_rules_limit(s->opts, item->length);
    if (limit < 1)
        return b2_search_too_long(item->index, item->length, s->opts, err);
    if (item->length > s->size.longest || limit > s->size.width)
        return b2_fail(err, B2_E_VALUE, "prompt %lld: %lld ids and %lld new tokens, there is room for %lld and %lld",
                       (long long)item->index, (long long)item->length, (long long)limit, (long long)s->size.longest,
                       (long long)s->size.width);
    s->seats[place] = (b2_seat){.item = *item, .limit = limit, .taken = 1};
    s->chooser->enter(s, place);
    return 0;
}

/* The group becomes the items that enter now. */
static int gather(b2_search *s, b2_err *err)
{
    int64_t running = seats_taken(s);
    s->group_count = 0;
    for (int32_t place = 0; place < s->size.places && !s->source_ended; place++) {
        if (s->seats[place].taken)
            continue;
        b2_sourced found = B2_SOURCE_END;
        b2_item *item = &s->entering[s->group_count];
        if (s->source->next(s->source, item, running + s->group_count == 0, &found, err) < 0)
            return -1;
        s->source_ended = found == B2_SOURCE_END || found == B2_SOURCE_LAST;
        if (found == B2_SOURCE_END || found == B2_SOURCE_LATER)
            return 0;
        if (sit_down(s, place, item, err) < 0)
            return -1;
        s->group[s->group_count++] = place;
    }
    return 0;
}

static int leave(b2_search *s, int32_t place, b2_err *err)
{
    b2_finished finished = {.index = s->seats[place].item.index,
                            .place = place,
                            .rows = s->opts->num_return_sequences,
                            .ld = s->width,
                            .lengths = s->lengths,
                            .scores = s->final_scores};
    s->chooser->give_out(s, place, &finished);
    if (s->sink->take(s->sink, &finished, err) < 0)
        return -1;
    s->step->leave(s->step, place);
    s->seats[place].taken = 0;
    return 0;
}

/* The tokens for a streamer, in transformers' order. */
static int put(b2_search *s, b2_err *err)
{
    b2_hooks *hooks = s->opts->hooks;
    if (!hooks || !hooks->put || s->opts->num_beams > 1)
        return 0;
    for (int64_t i = 0; i < s->rows; i++)
        s->shown[i] = s->said[0][s->row[i] * s->width + s->seats[s->row[i] / s->rows_per_seat].step - 1];
    return hooks->put(hooks, s->rows, s->shown, err);
}

/* From logits to tokens, and out with those that are finished. */
static int settle(b2_search *s, int fresh, b2_err *err)
{
    if (b2_cancel_poll(s->cancel))
        return b2_fail(err, B2_E_CANCEL, "cancelled");
    if (score(s, fresh, err) < 0 || s->chooser->choose(s, err) < 0 || put(s, err) < 0)
        return -1;
    int all_over = 1;
    for (int64_t k = 0; k < s->group_count; k++)
        all_over &= s->seats[s->group[k]].over;
    for (int64_t k = 0; k < s->group_count; k++)
        if (s->seats[s->group[k]].over && (all_over || !s->opts->hooks) && leave(s, s->group[k], err) < 0)
            return -1;
    return 0;
}

/* Fills the free places; an item may be finished with its first token, so that its place is free again. */
static int admit(b2_search *s, b2_err *err)
{
    for (;;) {
        if (gather(s, err) < 0)
            return -1;
        if (s->group_count == 0)
            return 0;
        s->rows = s->group_count;
        s->stats.items += s->group_count;
        for (int64_t k = 0; k < s->group_count; k++)
            s->row[k] = (int32_t)(s->group[k] * s->rows_per_seat);
        if (s->step->prefill(s->step, s->group_count, s->group, s->entering, s->few ? NULL : s->scores, err) < 0 ||
            settle(s, 1, err) < 0)
            return -1;
    }
}

/* The group becomes everybody. */
static int advance(b2_search *s, b2_err *err)
{
    s->group_count = s->rows = 0;
    for (int32_t place = 0; place < s->size.places; place++) {
        if (!s->seats[place].taken)
            continue;
        s->group[s->group_count++] = place;
        for (int64_t r = place * s->rows_per_seat; r < (place + 1) * s->rows_per_seat; r++) {
            if (!s->alive[r])
                continue;
            s->row[s->rows] = (int32_t)r;
            s->step_parent[s->rows] = s->parent[r];
            s->step_token[s->rows++] = s->token[r];
        }
    }
    if (s->group_count == 0)
        return 0;
    s->stats.steps++;
    s->stats.items_advanced += s->group_count;
    s->stats.rows_advanced += s->rows;
    b2_ahead_tell(s);
    if (s->step->advance(s->step, s->rows, s->row, s->step_parent, s->step_token, s->few ? NULL : s->scores, err) < 0)
        return -1;
    return settle(s, 0, err);
}

static int run(b2_search *s, b2_err *err)
{
    do {
        if (admit(s, err) < 0 || advance(s, err) < 0)
            return -1;
    } while (seats_taken(s) > 0 || !s->source_ended);
    return 0;
}

/* Sizes in bytes are products of these: none of them overflows, nor does a stride of rows. */
static int check_size(const b2_search *s, b2_err *err)
{
    if (s->size.width <= INT32_MAX - s->size.longest)
        return 0;
    return b2_fail(err, B2_E_MEMORY, "max_new_tokens: %lld tokens behind a prompt of %lld are more than can be counted",
                   (long long)s->size.width, (long long)s->size.longest);
}

int b2_search_run(b2_search *s, b2_err *err)
{
    if (check_size(s, err) < 0)
        return -1;
    s->chooser = s->opts->num_beams > 1 ? &b2_beam_chooser : &b2_single_chooser;
    s->width = s->size.width;
    s->rows_per_seat = b2_generate_rows_per_item(s->opts);
    s->stride = b2_rules_scratch(s->opts, s->step->vocabulary, s->size.longest + s->width);
    int status = reserve(s, err) < 0 || run(s, err) < 0 ? -1 : 0;
    release(s);
    return status;
}
