/* b2_generate: checks that name the option, the memory of the result, the choice of the search. */
#include "generate/generate.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "generate/search.h"

enum { SCORES_WORTH_THREADS = 32768 };

int b2_search_run(const b2_search *search, int64_t tiles, int64_t scores_per_tile, b2_tile_fn fn, void *argument,
                  b2_err *err)
{
    if (tiles > SCORES_WORTH_THREADS / scores_per_tile)
        return b2_pool_run(search->pool, tiles, fn, argument, search->cancel, err);
    for (int64_t i = 0; i < tiles; i++)
        fn(argument, i, 0);
    return 0;
}

static int check_beams(const b2_generate_opts *opts, b2_err *err)
{
    if (opts->num_beams < 1)
        return b2_fail(err, B2_E_VALUE, "num_beams: expected at least 1, found %d", opts->num_beams);
    if (opts->num_return_sequences < 1)
        return b2_fail(err, B2_E_VALUE, "num_return_sequences: expected at least 1, found %d",
                       opts->num_return_sequences);
    if (opts->num_return_sequences > opts->num_beams)
        return b2_fail(err, B2_E_VALUE, "num_return_sequences (%d) must not exceed num_beams (%d)",
                       opts->num_return_sequences, opts->num_beams);
    if (opts->early_stopping != B2_EARLY_STOPPING_FALSE && opts->early_stopping != B2_EARLY_STOPPING_TRUE &&
        opts->early_stopping != B2_EARLY_STOPPING_NEVER)
        return b2_fail(err, B2_E_VALUE, "early_stopping: unknown value %d", (int)opts->early_stopping);
    if (!isfinite(opts->length_penalty))
        return b2_fail(err, B2_E_VALUE, "length_penalty: expected a finite number, found %g", opts->length_penalty);
    return 0;
}

static int check_lengths(const b2_generate_opts *opts, b2_err *err)
{
    if (opts->max_length < 0 && opts->max_new_tokens < 0)
        return b2_fail(err, B2_E_VALUE, "max_new_tokens: neither it nor max_length is set");
    if (opts->max_new_tokens == 0)
        return b2_fail(err, B2_E_VALUE, "max_new_tokens: expected at least 1, found 0");
    if (opts->min_length < 0)
        return b2_fail(err, B2_E_VALUE, "min_length: expected at least 0, found %lld", (long long)opts->min_length);
    return 0;
}

static int check_prompts(const b2_prompts *prompts, int64_t vocabulary, b2_err *err)
{
    if (prompts->rows < 1)
        return b2_fail(err, B2_E_VALUE, "prompts: expected at least 1 row, found %lld", (long long)prompts->rows);
    if (vocabulary < 1 || vocabulary > INT32_MAX)
        return b2_fail(err, B2_E_VALUE, "vocabulary: expected 1 to 2^31-1 tokens, found %lld", (long long)vocabulary);
    for (int64_t b = 0; b < prompts->rows; b++) {
        int64_t length = prompts->offsets[b + 1] - prompts->offsets[b];
        if (length < 0 || (prompts->skip && (prompts->skip[b] < 0 || prompts->skip[b] > length)))
            return b2_fail(err, B2_E_VALUE, "prompts: row %lld: offsets or skipped ids out of order", (long long)b);
    }
    return 0;
}

/* Rows of the widest selection must be countable in int32: candidates are numbered beam * V + token. */
static int check_size(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    int64_t candidates = opts->eos_count > 1 ? 1 + opts->eos_count : 2;
    if (opts->num_beams > 1 && vocabulary > INT32_MAX / opts->num_beams)
        return b2_fail(err, B2_E_VALUE, "num_beams: %d beams of %lld tokens are too many", opts->num_beams,
                       (long long)vocabulary);
    if (opts->num_beams > 1 && candidates > vocabulary)
        return b2_fail(err, B2_E_VALUE, "num_beams: beam search over %lld end tokens needs a vocabulary of at least "
                       "%lld tokens, found %lld", (long long)opts->eos_count, (long long)candidates,
                       (long long)vocabulary);
    return 0;
}

static int set_limits(b2_search *search, b2_err *err)
{
    const b2_prompts *prompts = search->prompts;
    const b2_generate_opts *opts = search->opts;
    for (int64_t b = 0; b < prompts->rows; b++) {
        int64_t length = prompts->offsets[b + 1] - prompts->offsets[b];
        int64_t limit = b2_rules_limit(opts, length);
        if (limit < 1)
            return b2_fail(err, B2_E_VALUE, "max_length: prompt %lld has %lld tokens already, max_length is %lld; "
                           "raise it or set max_new_tokens", (long long)b, (long long)length,
                           (long long)opts->max_length);
        search->limits[b] = limit;
        search->width = limit > search->width ? limit : search->width;
        search->longest = length > search->longest ? length : search->longest;
    }
    return 0;
}

static int reserve_result(b2_search *search, b2_err *err)
{
    b2_generated *out = search->out;
    out->rows = search->prompts->rows * search->opts->num_return_sequences;
    size_t rows = (size_t)out->rows, width = (size_t)search->width;
    if (width > SIZE_MAX / rows)
        return b2_fail(err, B2_E_MEMORY, "max_new_tokens: %lld tokens overflow the address space",
                       (long long)search->width);
    out->ids = b2_alloc(rows * width, sizeof *out->ids, "generated ids", err);
    out->lengths = b2_alloc_zeroed(rows, sizeof *out->lengths, "generated lengths", err);
    out->scores = b2_alloc_zeroed(rows, sizeof *out->scores, "generated scores", err);
    return out->ids && out->lengths && out->scores ? 0 : -1;
}

/* Rows were written `width` apart; they move together to the width that was needed and get their pads. */
static void tighten(b2_generated *out, int64_t width, int32_t pad)
{
    for (int64_t r = 0; r < out->rows; r++)
        out->max_new = out->lengths[r] > out->max_new ? out->lengths[r] : out->max_new;
    for (int64_t r = 0; r < out->rows; r++) {
        int32_t *row = out->ids + r * out->max_new;
        memmove(row, out->ids + r * width, (size_t)out->lengths[r] * sizeof *row);
        for (int64_t i = out->lengths[r]; i < out->max_new; i++)
            row[i] = pad;
    }
}

static int search_and_tighten(b2_search *search, b2_err *err)
{
    search->limits = b2_alloc((size_t)search->prompts->rows, sizeof *search->limits, "length limits", err);
    if (!search->limits || set_limits(search, err) < 0 || reserve_result(search, err) < 0)
        return -1;
    int status = search->opts->num_beams > 1 ? b2_search_beams(search, err) : b2_search_greedy(search, err);
    if (status == 0)
        tighten(search->out, search->width, search->opts->pad_id);
    return status;
}

int b2_generate_check(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    if (check_prompts(prompts, vocabulary, err) < 0 || check_beams(opts, err) < 0 || check_lengths(opts, err) < 0 ||
        b2_rules_check(opts, vocabulary, err) < 0)
        return -1;
    return check_size(opts, vocabulary, err);
}

int b2_generate(b2_generated *out, const b2_prompts *prompts, const b2_generate_opts *opts, b2_step *step,
                b2_pool *pool, b2_cancel *cancel, b2_err *err)
{
    *out = (b2_generated){0};
    if (b2_generate_check(prompts, opts, step->vocabulary, err) < 0)
        return -1;
    if (opts->hooks)
        opts->hooks->vocabulary = step->vocabulary;
    b2_search search = {
        .prompts = prompts, .opts = opts, .step = step, .pool = pool, .cancel = cancel, .out = out};
    int status = search_and_tighten(&search, err);
    b2_free(search.limits);
    if (status < 0)
        b2_generated_release(out);
    return status;
}

void b2_generated_release(b2_generated *out)
{
    b2_free(out->ids);
    b2_free(out->lengths);
    b2_free(out->scores);
    *out = (b2_generated){0};
}
