#include "model/session.h"

#include <string.h>

#include "core/memory.h"
#include "generate/rules.h"
#include "model/stage.h"

/* ---- rows as prompts ---- */

/* Rows that a step advances at most, unless a single item has more: beyond, a step takes longer in proportion and
 * nothing is won. */
enum { ROWS_AT_ONCE = 64 };

static b2_prompt prompt_of(const b2_rows_in *in, int64_t b)
{
    int64_t places = in->features.rows / in->rows, at = in->offsets[b];
    b2_prompt prompt = {.ids = in->ids + at,
                        .mask = in->mask ? in->mask + at : NULL,
                        .length = in->offsets[b + 1] - at,
                        .prefix = in->prefixes ? in->prefixes[b] : NULL};
    if (in->features.data)
        prompt.features = b2_rows(in->features, b * places, places);
    if (!in->decoder_ids)
        return prompt;
    at = in->decoder_offsets[b];
    prompt.decoder_ids = in->decoder_ids + at;
    prompt.decoder_mask = in->decoder_mask ? in->decoder_mask + at : NULL;
    prompt.decoder_length = in->decoder_offsets[b + 1] - at;
    return prompt;
}

/* [B] checked prompts, to be freed; NULL on failure. */
static b2_prompt *prompts_of(const b2_blip2 *model, const b2_rows_in *in, b2_err *err)
{
    const int64_t *decoder = in->decoder_ids ? in->decoder_offsets : NULL;
    if (in->offsets[0] != 0 || (decoder && decoder[0] != 0)) {
        b2_fail(err, B2_E_VALUE, "%soffsets: expected to begin with 0, found %lld", in->offsets[0] ? "" : "decoder_",
                (long long)(in->offsets[0] ? in->offsets[0] : decoder[0]));
        return NULL;
    }
    b2_prompt *prompts = b2_alloc((size_t)in->rows, sizeof *prompts, "prompts", err);
    for (int64_t b = 0; prompts && b < in->rows; b++) {
        prompts[b] = prompt_of(in, b);
        if (b2_prompt_check(model, &prompts[b], b, err) < 0) {
            b2_free(prompts);
            return NULL;
        }
    }
    return prompts;
}

static b2_places_size size_of(const b2_prompt *prompts, int64_t rows)
{
    b2_places_size size = {.places = rows, .rows_per_place = 1};
    int64_t timeline = 0, encoded = 0;
    for (int64_t b = 0; b < rows; b++) {
        const b2_prompt *prompt = &prompts[b];
        size.longest = b2_max64(size.longest, b2_prompt_length(prompt));
        timeline += b2_prompt_length(prompt);
        size.masked |= prompt->mask || prompt->decoder_mask;
        if (!prompt->decoder_ids)
            continue;
        size.longest_encoded = b2_max64(size.longest_encoded, prompt->length);
        encoded += prompt->length;
    }
    size.together = b2_max64(timeline, encoded);
    return size;
}

int b2_session_forward(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, b2_tensor logits, b2_err *err)
{
    b2_prompt *prompts = prompts_of(model, in, err);
    if (!prompts || in->rows == 0) {
        b2_free(prompts);
        return prompts ? 0 : -1;
    }
    b2_places_size size = size_of(prompts, in->rows);
    size.all_logits = 1;
    b2_places places;
    int status = b2_places_open(&places, ctx, model, &size, err);
    if (status == 0)
        status = b2_places_prefill(&places, in->rows, prompts, logits, err);
    b2_places_close(&places);
    b2_free(prompts);
    return status;
}

/* ---- generating ---- */

/* Prompts as the search sees them. Owns everything but `b2_prompts.keys`. */
typedef struct search_prompts {
    b2_prompts view;
    b2_prompt *prompts;     /* [B] */
    const void **pointers;  /* [B] */
    int32_t *ids;           /* prefixes and rows, one after another; NULL without prefixes */
    int64_t *offsets;       /* [B + 1] */
    int64_t *skip;          /* [B] */
} search_prompts;

static void search_prompts_release(search_prompts *s)
{
    b2_free(s->prompts);
    b2_free(s->pointers);
    b2_free(s->ids);
    b2_free(s->offsets);
    b2_free(s->skip);
}

static int64_t leading_pads(const uint8_t *mask, int64_t length)
{
    int64_t count = 0;
    while (mask && count < length && !mask[count])
        count++;
    return count;
}

/* The rules see what stands in a prefix too. */
static int join_prefixes(search_prompts *s, const b2_rows_in *in, const int32_t *rule_ids, b2_err *err)
{
    s->ids = b2_alloc((size_t)s->offsets[in->rows], sizeof *s->ids, "ids of prompts", err);
    if (!s->ids)
        return -1;
    for (int64_t b = 0; b < in->rows; b++) {
        const b2_prefix *prefix = s->prompts[b].prefix;
        int32_t *to = s->ids + s->offsets[b];
        if (prefix)
            memcpy(to, prefix->rule_ids, (size_t)prefix->length * sizeof *to);
        memcpy(to + (prefix ? prefix->length : 0), rule_ids + in->offsets[b],
               (size_t)s->prompts[b].length * sizeof *to);
    }
    s->view.ids = s->ids;
    return 0;
}

static int make_search_prompts(search_prompts *s, const b2_blip2 *model, const b2_rows_in *in,
                               const b2_session_request *request, b2_err *err)
{
    size_t rows = (size_t)in->rows;
    if (!(s->prompts = prompts_of(model, in, err)) ||
        !(s->pointers = b2_alloc(rows, sizeof *s->pointers, "prompts", err)) ||
        !(s->offsets = b2_alloc(rows + 1, sizeof *s->offsets, "offsets of prompts", err)) ||
        !(s->skip = b2_alloc(rows, sizeof *s->skip, "pads of prompts", err)))
        return -1;
    s->offsets[0] = 0;
    for (int64_t b = 0; b < in->rows; b++) {
        const b2_prompt *prompt = &s->prompts[b];
        s->pointers[b] = prompt;
        s->offsets[b + 1] = s->offsets[b] + b2_prompt_length(prompt);
        s->skip[b] = prompt->decoder_ids ? leading_pads(prompt->decoder_mask, prompt->decoder_length)
                     : prompt->prefix    ? 0
                                         : leading_pads(prompt->mask, prompt->length);
    }
    s->view = (b2_prompts){.rows = in->rows,
                           .ids = request->rule_ids,
                           .offsets = s->offsets,
                           .skip = s->skip,
                           .keys = request->keys,
                           .prompts = s->pointers};
    return in->prefixes ? join_prefixes(s, in, request->rule_ids, err) : 0;
}

/* Tokens that a row may append and the model then read, which is all but the last; never more than the model has
 * positions for (a search that gets there fails with that message). */
static int64_t steps_of(const b2_blip2 *model, int64_t width)
{
    int64_t positions = model->lm->config.max_position_embeddings;
    return (width > positions ? positions + 1 : width) - 1;
}

/* Has every finished item before it leaves its place. */
typedef struct keeper {
    b2_sink base;
    b2_places *places;
    const b2_prompts *prompts;
    b2_prefix **kept;
} keeper;

static int keep(b2_sink *sink, const b2_finished *finished, b2_err *err)
{
    keeper *k = (keeper *)sink;
    const int32_t *rules = k->prompts->ids + k->prompts->offsets[finished->index];
    for (int64_t j = 0; j < finished->rows; j++) {
        const int32_t *beams = finished->beams ? finished->beams + j * finished->ld : NULL;
        if (b2_places_keep(&k->kept[finished->index * finished->rows + j], k->places, finished->place, rules,
                           finished->ids + j * finished->ld, finished->lengths[j], beams, (int32_t)j, err) < 0)
            return -1;
    }
    return 0;
}

static int run_search(b2_places *places, const search_prompts *s, const b2_search_size *size, b2_prefix **kept,
                      const b2_generate_opts *opts, b2_generated *out, b2_session_stats *stats, b2_err *err)
{
    keeper k = {{keep}, places, &s->view, kept};
    b2_ctx *ctx = places->ctx;
    if (b2_generate(out, &s->view, size, opts, &places->step, kept ? &k.base : NULL, ctx->pool, ctx->cancel, err) < 0)
        return -1;
    *stats = (b2_session_stats){places->bytes_most, places->step_allocations, out->stats};
    return 0;
}

static int generate(b2_ctx *ctx, const b2_blip2 *model, const search_prompts *s, b2_prefix ***kept,
                    const b2_generate_opts *opts, b2_generated *out, b2_session_stats *stats, b2_err *err)
{
    if (b2_generate_check(&s->view, opts, model->lm->config.vocab_size, err) < 0)
        return -1;
    for (int64_t b = 0; kept && b < s->view.rows; b++)
        if (b2_prompt_check_keep(&s->prompts[b], b, err) < 0)
            return -1;
    b2_search_size search = b2_generate_size(&s->view, opts, ROWS_AT_ONCE);
    b2_places_size size = size_of(s->prompts, s->view.rows);
    size.places = search.places;
    size.rows_per_place = b2_generate_rows_per_item(opts);
    size.steps = steps_of(model, search.width);
    b2_places places;
    int status = b2_places_open(&places, ctx, model, &size, err);
    /* Behind the checks of what was asked for, and the largest memory. */
    if (status == 0 && kept) {
        size_t results = (size_t)s->view.rows * (size_t)opts->num_return_sequences;
        *kept = b2_alloc_zeroed(results, sizeof **kept, "kept prefixes", err);
        status = *kept ? 0 : -1;
    }
    if (status == 0)
        status = run_search(&places, s, &search, kept ? *kept : NULL, opts, out, stats, err);
    b2_places_close(&places);
    return status;
}

int b2_session_generate(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, const b2_session_request *request,
                        const b2_generate_opts *opts, b2_generated *out, b2_session_stats *stats, b2_err *err)
{
    search_prompts prompts = {0};
    if (b2_generate_check_options(opts, model->lm->config.vocab_size, err) < 0)
        return -1;
    int status = make_search_prompts(&prompts, model, in, request, err);
    if (status == 0)
        status = generate(ctx, model, &prompts, request->kept, opts, out, stats, err);
    search_prompts_release(&prompts);
    return status;
}

int b2_session_stream(b2_ctx *ctx, const b2_blip2 *model, const b2_stream_size *size, b2_source *source, b2_sink *sink,
                      const b2_generate_opts *opts, b2_session_stats *stats, b2_err *err)
{
    int encodes = model->lm->class_->encode != NULL;
    int64_t longest = encodes ? size->longest_decoder : size->longest, width = b2_rules_limit(opts, 1);
    if (b2_generate_check_options(opts, model->lm->config.vocab_size, err) < 0)
        return -1;
    if (size->places < 1 || size->places > INT32_MAX || size->longest < 1 || longest < 1 || width < 1)
        return b2_fail(err, B2_E_VALUE, "places: expected at least 1, prompts of at least 1 token and 1 new token, found "
                       "%lld, %lld and %lld", (long long)size->places, (long long)longest, (long long)width);
    b2_search_size search = {size->places, longest, width};
    b2_places_size open = {.places = size->places,
                           .rows_per_place = b2_generate_rows_per_item(opts),
                           .longest = longest,
                           .longest_encoded = encodes ? size->longest : 0,
                           .together = INT64_MAX,
                           .steps = steps_of(model, width),
                           .masked = size->masked};
    b2_places places;
    int status = b2_places_open(&places, ctx, model, &open, err);
    if (status == 0)
        status = b2_generate_stream(&stats->search, &search, source, sink, opts, &places.step, ctx->pool, ctx->cancel, err);
    stats->kv_bytes = places.bytes_most;
    stats->step_allocations = places.step_allocations;
    b2_places_close(&places);
    return status;
}

/* ---- prefixes ---- */

/* Ids of the prompt's whole timeline as the rules see them, to be freed. */
static int32_t *rules_of(const b2_prompt *prompt, const int32_t *rule_ids, b2_err *err)
{
    const b2_prefix *before = prompt->prefix;
    int64_t first = before ? before->length : 0;
    int32_t *rules = b2_alloc((size_t)(first + prompt->length), sizeof *rules, "ids of a prefix", err);
    if (rules && before)
        memcpy(rules, before->rule_ids, (size_t)first * sizeof *rules);
    if (rules)
        memcpy(rules + first, rule_ids, (size_t)prompt->length * sizeof *rules);
    return rules;
}

static int read_prefix(b2_prefix **prefix, b2_ctx *ctx, const b2_blip2 *model, const b2_prompt *prompt,
                       const int32_t *rules, b2_err *err)
{
    b2_places_size size = size_of(prompt, 1);
    b2_places places;
    int status = b2_places_open(&places, ctx, model, &size, err);
    if (status == 0)
        status = b2_places_prefill(&places, 1, prompt, (b2_tensor){0}, err);
    if (status == 0)
        status = b2_places_keep(prefix, &places, 0, rules, NULL, 0, NULL, 0, err);
    b2_places_close(&places);
    return status;
}

int b2_session_prefix(b2_prefix **prefix, b2_ctx *ctx, const b2_blip2 *model, const b2_prompt *prompt,
                      const int32_t *rule_ids, b2_err *err)
{
    if (model->lm->class_->encode)
        return b2_fail(err, B2_E_UNSUPPORTED, "prefix: an encoder reads the whole prompt at once, a beginning of it can not "
                       "be kept");
    if (b2_prompt_check(model, prompt, 0, err) < 0)
        return -1;
    int32_t *rules = rules_of(prompt, rule_ids, err);
    int status = rules ? read_prefix(prefix, ctx, model, prompt, rules, err) : -1;
    b2_free(rules);
    return status;
}
