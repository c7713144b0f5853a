/* b2_generate and b2_generate_stream: checks that name the option, and for prompts that are all there a source over them and
 * a sink that makes one array of the results. */
#include "generate/generate.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "generate/search.h"

static int check_beams(const b2_generate_opts *opts, b2_err *err)
{
    if (opts->num_beams < 1)
        return b2_fail(err, B2_E_VALUE, "num_beams: expected at least 1, found %d", opts->num_beams);
    if (opts->num_return_sequences < 1)
        return b2_fail(err, B2_E_VALUE, "num_return_sequences: expected at least 1, found %d",
                       opts->num_return_sequences);
    if (opts->num_return_sequences > opts->num_beams && !(opts->do_sample && opts->num_beams == 1))
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

static int check_prompts(const b2_prompts *prompts, b2_err *err)
{
    if (prompts->rows < 1)
        return b2_fail(err, B2_E_VALUE, "prompts: expected at least 1 row, found %lld", (long long)prompts->rows);
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

int64_t b2_generate_rows_per_item(const b2_generate_opts *opts)
{
    return opts->num_beams > 1 ? opts->num_beams : opts->num_return_sequences;
}

b2_search_size b2_generate_size(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t rows_at_once)
{
    int64_t most = rows_at_once / b2_generate_rows_per_item(opts);
    b2_search_size size = {.places = most < 1 ? 1 : most};
    if (prompts->rows < size.places || rows_at_once <= 0 || opts->hooks)
        size.places = prompts->rows;
    for (int64_t b = 0; b < prompts->rows; b++) {
        int64_t length = prompts->offsets[b + 1] - prompts->offsets[b], limit = b2_rules_limit(opts, length);
        size.width = limit > size.width ? limit : size.width;
        size.longest = length > size.longest ? length : size.longest;
    }
    return size;
}

int b2_generate_check_options(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    if (vocabulary < 1 || vocabulary > INT32_MAX)
        return b2_fail(err, B2_E_VALUE, "vocabulary: expected 1 to 2^31-1 tokens, found %lld", (long long)vocabulary);
    if (check_beams(opts, err) < 0 || check_lengths(opts, err) < 0 || b2_rules_check(opts, vocabulary, err) < 0)
        return -1;
    return check_size(opts, vocabulary, err);
}

/* What callables see is a rectangle, and rows that have ended go on in it with the pad. */
static int check_hooks(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    for (int64_t b = 0; opts->hooks && b < prompts->rows; b++)
        if (prompts->offsets[b + 1] - prompts->offsets[b] != prompts->offsets[1])
            return b2_fail(err, B2_E_VALUE, "prompts: logits_processor, stopping_criteria, streamer and recorded scores "
                           "need prompts of one length; row %lld has %lld ids, row 0 has %lld", (long long)b,
                           (long long)(prompts->offsets[b + 1] - prompts->offsets[b]), (long long)prompts->offsets[1]);
    if (opts->hooks && opts->num_beams == 1 && opts->eos_count > 0 && (opts->pad_id < 0 || opts->pad_id >= vocabulary))
        return b2_fail(err, B2_E_VALUE, "pad_token_id: rows that have ended go on with it, and %d is outside the "
                       "vocabulary of %lld tokens", (int)opts->pad_id, (long long)vocabulary);
    return 0;
}

int b2_generate_check(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    if (check_prompts(prompts, err) < 0 || b2_generate_check_options(opts, vocabulary, err) < 0 ||
        check_hooks(prompts, opts, vocabulary, err) < 0)
        return -1;
    for (int64_t b = 0; b < prompts->rows; b++) {
        int64_t length = prompts->offsets[b + 1] - prompts->offsets[b];
        if (b2_rules_limit(opts, length) < 1)
            return b2_search_too_long(b, length, opts, err);
    }
    return 0;
}

/* The prompts in order. */
typedef struct array_source {
    b2_source base;
    const b2_prompts *prompts;
    int64_t next;
} array_source;

static int next_prompt(b2_source *source, b2_item *item, int wait, b2_sourced *found, b2_err *err)
{
    (void)wait, (void)err;
    array_source *from = (array_source *)source;
    const b2_prompts *prompts = from->prompts;
    int64_t b = from->next++;
    *found = b >= prompts->rows ? B2_SOURCE_END : b + 1 == prompts->rows ? B2_SOURCE_LAST : B2_SOURCE_ITEM;
    if (b < prompts->rows)
        *item = (b2_item){.index = b,
                          .ids = prompts->ids + prompts->offsets[b],
                          .length = prompts->offsets[b + 1] - prompts->offsets[b],
                          .skip = prompts->skip ? prompts->skip[b] : 0,
                          .key = prompts->keys ? prompts->keys[b] : (uint64_t)b,
                          .prompt = prompts->prompts ? prompts->prompts[b] : NULL};
    return 0;
}

/* Results at the place that their prompt has. */
typedef struct array_sink {
    b2_sink base;
    b2_generated *out; /* arrays of [rows, width] */
    int64_t width;
    int beam_count;
    b2_sink *also;
} array_sink;

static int take(b2_sink *sink, const b2_finished *finished, b2_err *err)
{
    array_sink *to = (array_sink *)sink;
    b2_generated *out = to->out;
    for (int64_t j = 0; j < finished->rows; j++) {
        int64_t row = finished->index * finished->rows + j, length = finished->lengths[j];
        out->lengths[row] = length;
        out->scores[row] = finished->scores[j];
        memcpy(out->ids + row * to->width, finished->ids + j * finished->ld, (size_t)length * sizeof *out->ids);
        for (int64_t i = 0; out->beam_rows && i < length; i++)
            out->beam_rows[row * to->width + i] =
                (int32_t)(finished->index * to->beam_count) + finished->beams[j * finished->ld + i];
    }
    return to->also ? to->also->take(to->also, finished, err) : 0;
}

static int reserve_result(b2_generated *out, int64_t prompts, const b2_generate_opts *opts, int64_t width, b2_err *err)
{
    out->rows = prompts * opts->num_return_sequences;
    size_t rows = (size_t)out->rows;
    if ((size_t)width > SIZE_MAX / sizeof(int32_t) / rows)
        return b2_fail(err, B2_E_MEMORY, "max_new_tokens: %lld tokens overflow the address space", (long long)width);
    out->ids = b2_alloc(rows * (size_t)width, sizeof *out->ids, "generated ids", err);
    out->lengths = b2_alloc_zeroed(rows, sizeof *out->lengths, "generated lengths", err);
    out->scores = b2_alloc_zeroed(rows, sizeof *out->scores, "generated scores", err);
    if (opts->num_beams > 1)
        out->beam_rows = b2_alloc(rows * (size_t)width, sizeof *out->beam_rows, "beam indices", err);
    return out->ids && out->lengths && out->scores && (out->beam_rows || opts->num_beams == 1) ? 0 : -1;
}

/* Rows were written `width` apart; they move together to the width that was needed and are filled up. */
static void tighten(const b2_generated *out, int32_t *values, int64_t width, int32_t filling)
{
    for (int64_t r = 0; values && r < out->rows; r++) {
        int32_t *row = values + r * out->max_new;
        memmove(row, values + r * width, (size_t)out->lengths[r] * sizeof *row);
        for (int64_t i = out->lengths[r]; i < out->max_new; i++)
            row[i] = filling;
    }
}

int b2_generate(b2_generated *out, const b2_prompts *prompts, const b2_search_size *size, const b2_generate_opts *opts,
                b2_step *step, b2_sink *also, b2_pool *pool, b2_cancel *cancel, b2_err *err)
{
    *out = (b2_generated){0};
    if (b2_generate_check(prompts, opts, step->vocabulary, err) < 0)
        return -1;
    if (opts->hooks && size->places < prompts->rows)
        return b2_fail(err, B2_E_INTERNAL, "hooks: %lld places for %lld prompts", (long long)size->places,
                       (long long)prompts->rows);
    if (opts->hooks)
        opts->hooks->vocabulary = step->vocabulary;
    array_source source = {{next_prompt}, prompts, 0};
    array_sink sink = {{take}, out, size->width, opts->num_beams, also};
    b2_search search = {.opts = opts, .size = *size, .source = &source.base, .sink = &sink.base, .step = step,
                        .pool = pool, .cancel = cancel};
    if (reserve_result(out, prompts->rows, opts, size->width, err) < 0 || b2_search_run(&search, err) < 0) {
        b2_generated_release(out);
        return -1;
    }
    out->stats = search.stats;
    for (int64_t r = 0; r < out->rows; r++)
        out->max_new = out->lengths[r] > out->max_new ? out->lengths[r] : out->max_new;
    tighten(out, out->ids, size->width, opts->pad_id);
    tighten(out, out->beam_rows, size->width, -1);
    return 0;
}

void b2_generated_release(b2_generated *out)
{
    b2_free(out->ids);
    b2_free(out->lengths);
    b2_free(out->scores);
    b2_free(out->beam_rows);
    *out = (b2_generated){0};
}

int b2_generate_stream(b2_search_stats *stats, const b2_search_size *size, b2_source *source, b2_sink *sink,
                       const b2_generate_opts *opts, b2_step *step, b2_pool *pool, b2_cancel *cancel, b2_err *err)
{
    if (b2_generate_check_options(opts, step->vocabulary, err) < 0)
        return -1;
    if (opts->hooks)
        return b2_fail(err, B2_E_UNSUPPORTED, "logits_processor, stopping_criteria, streamer and recorded scores need all "
                       "rows to begin together; items that come one by one do not");
    if (size->places < 1 || size->longest < 0 || size->width < 1)
        return b2_fail(err, B2_E_VALUE, "places: expected at least 1 place and 1 new token, found %lld and %lld",
                       (long long)size->places, (long long)size->width);
    b2_search search = {.opts = opts, .size = *size, .source = source, .sink = sink, .step = step, .pool = pool,
                        .cancel = cancel};
    int status = b2_search_run(&search, err);
    *stats = search.stats;
    return status;
}
