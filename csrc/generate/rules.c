#include "generate/rules.h"

#include <float.h>
#include <math.h>

#include "generate/scores.h"
#include "generate/warpers.h"

static int64_t length_of(const b2_history *history)
{
    return history->prompt_length + history->made_length;
}

static int32_t id_at(const b2_history *history, int64_t i)
{
    return i < history->prompt_length ? history->prompt[i] : history->made[i - history->prompt_length];
}

/* Ids below 0 (image features) and, as upstream, ids that the head does not have are no candidates. */
static void forbid(float *scores, int64_t vocabulary, int32_t id)
{
    if (id >= 0 && id < vocabulary)
        scores[id] = -INFINITY;
}

/* No rule makes an infinity: added to a forbidden token's it would be NaN, which no order has a place for. */
static float at_most(float score)
{
    return score > FLT_MAX ? FLT_MAX : score;
}

static float within(float value)
{
    return value < -FLT_MAX ? -FLT_MAX : at_most(value);
}

/* Every id of the history is penalised once however often it occurs: read all scores first, then write. */
static void penalise_repetition(float *scores, int64_t vocabulary, const b2_history *history, float penalty,
                                float *scratch)
{
    int64_t length = length_of(history);
    for (int64_t i = history->skip; i < length; i++) {
        int32_t id = id_at(history, i);
        float score = id >= 0 && id < vocabulary ? scores[id] : 0.0f;
        scratch[i] = score < 0.0f ? score * penalty : at_most(score / penalty);
    }
    for (int64_t i = history->skip; i < length; i++) {
        int32_t id = id_at(history, i);
        if (id >= 0 && id < vocabulary)
            scores[id] = scratch[i];
    }
}

/* Do the `n` ids from `first` equal the last n ids? An image feature equals nothing. */
static int repeats_tail(const b2_history *history, int64_t first, int64_t n)
{
    int64_t tail = length_of(history) - n;
    for (int64_t j = 0; j < n; j++) {
        int32_t id = id_at(history, first + j);
        if (id < 0 || id != id_at(history, tail + j))
            return 0;
    }
    return 1;
}

static void forbid_repeated_ngrams(float *scores, int64_t vocabulary, const b2_history *history, int64_t size)
{
    int64_t length = length_of(history);
    for (int64_t first = 0; first + size <= length; first++)
        if (repeats_tail(history, first, size - 1))
            forbid(scores, vocabulary, id_at(history, first + size - 1));
}

static int tail_is(const b2_history *history, const int32_t *ids, int64_t n)
{
    int64_t tail = length_of(history) - n;
    if (tail < 0)
        return 0;
    for (int64_t j = 0; j < n; j++)
        if (id_at(history, tail + j) != ids[j])
            return 0;
    return 1;
}

/* A word is forbidden by its last id once the others have just been said. A word that is an end token alone is
 * dropped upstream: it would make the search unable to end. */
static void forbid_bad_words(float *scores, int64_t vocabulary, const b2_history *history,
                             const b2_generate_opts *opts)
{
    for (int64_t w = 0; w < opts->bad_word_count; w++) {
        const int32_t *word = opts->bad_words + opts->bad_word_offsets[w];
        int64_t length = opts->bad_word_offsets[w + 1] - opts->bad_word_offsets[w];
        if (length == 1 && b2_rules_is_eos(opts, word[0]))
            continue;
        int32_t last = word[length - 1];
        if (tail_is(history, word, length - 1) && last < vocabulary)
            scores[last] += -INFINITY; /* a bias upstream: NaN and Inf become NaN, which remove_invalid_values sees */
    }
}

static int too_short(const b2_history *history, const b2_generate_opts *opts)
{
    return length_of(history) < opts->min_length;
}

static void forbid_all(float *scores, int64_t vocabulary, const int32_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        forbid(scores, vocabulary, ids[i]);
}

/* The biases of one token are added up first, single ids before longer sequences, as upstream; then once to the score.
 * sums [V]; only the entries of biased tokens are used. */
static void add_biases(float *scores, const b2_history *history, const b2_generate_opts *opts, float *sums)
{
    const int64_t *offsets = opts->biased_offsets;
    for (int64_t w = 0; w < opts->biased_count; w++)
        sums[opts->biased[offsets[w + 1] - 1]] = 0.0f;
    for (int64_t w = 0; w < opts->biased_count; w++) {
        int64_t length = offsets[w + 1] - offsets[w];
        const int32_t *ids = opts->biased + offsets[w];
        if (tail_is(history, ids, length - 1))
            sums[ids[length - 1]] = at_most(sums[ids[length - 1]] + opts->biases[w]);
    }
    for (int64_t w = 0; w < opts->biased_count; w++) {
        int32_t id = opts->biased[offsets[w + 1] - 1];
        scores[id] = at_most(scores[id] + sums[id]);
        sums[id] = 0.0f;
    }
}

static void force(float *scores, int64_t vocabulary, const int32_t *ids, int64_t count)
{
    b2_scores_fill(scores, vocabulary, -INFINITY);
    for (int64_t i = 0; i < count; i++)
        scores[ids[i]] = 0.0f;
}

static int at_limit(const b2_history *history, const b2_generate_opts *opts)
{
    return history->made_length + 1 == b2_rules_limit(opts, history->prompt_length);
}

static void remove_invalid(float *scores, int64_t vocabulary)
{
    for (int64_t i = 0; i < vocabulary; i++) {
        float score = scores[i] != scores[i] ? 0.0f : scores[i];
        score = score > FLT_MAX ? FLT_MAX : score;
        scores[i] = score < -FLT_MAX ? -FLT_MAX : score;
    }
}

/* Repeated end ids count once. */
static int said_before(const int32_t *ids, int64_t i)
{
    for (int64_t j = 0; j < i; j++)
        if (ids[j] == ids[i])
            return 1;
    return 0;
}

static void decay(float *scores, const b2_history *history, const b2_generate_opts *opts)
{
    int64_t over = history->made_length - opts->decay_start;
    if (over <= 0)
        return;
    float factor = within((float)(pow(opts->decay_factor, (double)over) - 1.0)); /* 0 * Inf would be NaN */
    for (int64_t i = 0; i < opts->eos_count; i++) {
        float *score = &scores[opts->eos_ids[i]];
        if (isfinite(*score) && !said_before(opts->eos_ids, i))
            *score = at_most(*score + at_most(fabsf(*score) * factor));
    }
}

/* Where a row begins: behind its prompt, or one later where forced_bos_token_id fills the first place. */
static int begins(const b2_history *history, const b2_generate_opts *opts)
{
    int is_forced = history->prompt_length <= 1 && opts->forced_bos_count > 0;
    return history->made_length == (is_forced ? 1 : 0);
}

/* In beam search one token more than could end the row must stay. */
static int64_t tokens_to_keep(const b2_generate_opts *opts)
{
    if (opts->num_beams <= 1)
        return 1;
    return opts->eos_count > 0 ? opts->eos_count + 1 : 2;
}

static void warp(float *scores, int64_t vocabulary, const b2_generate_opts *opts, b2_rule rule, void *scratch)
{
    int64_t keep = tokens_to_keep(opts);
    if (rule == B2_RULE_TEMPERATURE)
        b2_warp_temperature(scores, vocabulary, (float)opts->temperature);
    if (rule == B2_RULE_TOP_H && opts->top_h > 0.0)
        b2_warp_top_h(scores, vocabulary, opts->top_h, scratch);
    if (rule == B2_RULE_TOP_K && opts->top_k > 0)
        b2_warp_top_k(scores, vocabulary, opts->top_k > keep ? opts->top_k : keep, scratch);
    if (rule == B2_RULE_TOP_P && opts->top_p < 1.0)
        b2_warp_top_p(scores, vocabulary, opts->top_p, keep, scratch);
    if (rule == B2_RULE_MIN_P && opts->min_p > 0.0)
        b2_warp_min_p(scores, vocabulary, opts->min_p, keep, scratch);
    if (rule == B2_RULE_TYPICAL && opts->typical_p < 1.0)
        b2_warp_typical(scores, vocabulary, opts->typical_p, keep, scratch);
    if (rule == B2_RULE_EPSILON && opts->epsilon_cutoff > 0.0)
        b2_warp_epsilon(scores, vocabulary, opts->epsilon_cutoff, keep, scratch);
    if (rule == B2_RULE_ETA && opts->eta_cutoff > 0.0)
        b2_warp_eta(scores, vocabulary, opts->eta_cutoff, keep, scratch);
}

static void apply(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                  b2_rule rule, void *scratch)
{
    switch (rule) {
    case B2_RULE_SEQUENCE_BIAS:
        add_biases(scores, history, opts, scratch);
        break;
    case B2_RULE_REPETITION:
        if (opts->repetition_penalty != 1.0f)
            penalise_repetition(scores, vocabulary, history, opts->repetition_penalty, scratch);
        break;
    case B2_RULE_NGRAMS:
        if (opts->no_repeat_ngram_size > 0)
            forbid_repeated_ngrams(scores, vocabulary, history, opts->no_repeat_ngram_size);
        break;
    case B2_RULE_BAD_WORDS:
        forbid_bad_words(scores, vocabulary, history, opts);
        break;
    case B2_RULE_MIN_LENGTH:
        if (too_short(history, opts))
            forbid_all(scores, vocabulary, opts->eos_ids, opts->eos_count);
        break;
    case B2_RULE_MIN_NEW_TOKENS:
        if (history->made_length < opts->min_new_tokens)
            forbid_all(scores, vocabulary, opts->eos_ids, opts->eos_count);
        break;
    case B2_RULE_FORCED_BOS:
        if (opts->forced_bos_count > 0 && length_of(history) == 1)
            force(scores, vocabulary, opts->forced_bos_ids, opts->forced_bos_count);
        break;
    case B2_RULE_FORCED_EOS:
        if (opts->forced_eos_count > 0 && at_limit(history, opts))
            force(scores, vocabulary, opts->forced_eos_ids, opts->forced_eos_count);
        break;
    case B2_RULE_REMOVE_INVALID:
        if (opts->remove_invalid_values)
            remove_invalid(scores, vocabulary);
        break;
    case B2_RULE_DECAY:
        if (opts->decays)
            decay(scores, history, opts);
        break;
    case B2_RULE_SUPPRESS:
        forbid_all(scores, vocabulary, opts->suppress_ids, opts->suppress_count);
        break;
    case B2_RULE_BEGIN_SUPPRESS:
        if (begins(history, opts))
            forbid_all(scores, vocabulary, opts->begin_suppress_ids, opts->begin_suppress_count);
        break;
    case B2_RULE_RENORMALIZE:
        if (opts->renormalize_logits)
            b2_scores_log_softmax(scores, vocabulary);
        break;
    default:
        if (opts->do_sample)
            warp(scores, vocabulary, opts, rule, scratch);
    }
}

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

int64_t b2_rules_scratch(const b2_generate_opts *opts, int64_t vocabulary, int64_t longest)
{
    int64_t floats = larger(longest, opts->biased_count > 0 ? vocabulary : 0);
    int64_t bytes = (floats * (int64_t)sizeof(float) + 63) / 64 * 64;
    return larger(64, opts->do_sample ? larger(bytes, b2_warpers_scratch(vocabulary)) : bytes);
}

void b2_rules_apply_range(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                          b2_rule first, b2_rule end, void *scratch)
{
    for (int rule = first; rule < (int)end; rule++)
        apply(scores, vocabulary, history, opts, (b2_rule)rule, scratch);
}

void b2_rules_apply(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                    void *scratch)
{
    b2_rules_apply_range(scores, vocabulary, history, opts, B2_RULE_SEQUENCE_BIAS, B2_RULES, scratch);
}

int b2_rules_is_eos(const b2_generate_opts *opts, int32_t id)
{
    for (int64_t i = 0; i < opts->eos_count; i++)
        if (opts->eos_ids[i] == id)
            return 1;
    return 0;
}

int64_t b2_rules_limit(const b2_generate_opts *opts, int64_t prompt_length)
{
    int64_t limit = opts->max_new_tokens >= 0 ? opts->max_new_tokens : INT64_MAX;
    if (opts->max_length >= 0 && opts->max_length - prompt_length < limit)
        limit = opts->max_length - prompt_length;
    return limit;
}

/* ---- checks ---- */

static int check_ids(const char *name, const int32_t *ids, int64_t count, int64_t vocabulary, b2_err *err)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocabulary)
            return b2_fail(err, B2_E_VALUE, "%s: id %d is outside the vocabulary of %lld tokens", name, (int)ids[i],
                           (long long)vocabulary);
    return 0;
}

static int check_words(const char *name, const int32_t *ids, const int64_t *offsets, int64_t count, int64_t vocabulary,
                       b2_err *err)
{
    for (int64_t w = 0; w < count; w++)
        if (offsets[w + 1] <= offsets[w])
            return b2_fail(err, B2_E_VALUE, "%s: sequence %lld is empty", name, (long long)w);
    return check_ids(name, ids, count > 0 ? offsets[count] : 0, vocabulary, err);
}

static int check_range(const char *name, double value, int is_inside, const char *expected, b2_err *err)
{
    if (is_inside)
        return 0;
    return b2_fail(err, B2_E_VALUE, "%s: expected a number %s, found %g", name, expected, value);
}

static int check_biases(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    for (int64_t w = 0; w < opts->biased_count; w++)
        if (!(opts->biases[w] < INFINITY))
            return b2_fail(err, B2_E_VALUE, "sequence_bias: expected finite biases or -inf, found %g",
                           (double)opts->biases[w]);
    return check_words("sequence_bias", opts->biased, opts->biased_offsets, opts->biased_count, vocabulary, err);
}

static int check_decay(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    if (!opts->decays)
        return 0;
    if (opts->eos_count == 0)
        return b2_fail(err, B2_E_VALUE, "exponential_decay_length_penalty: needs an eos_token_id");
    if (!isfinite(opts->decay_factor))
        return b2_fail(err, B2_E_VALUE, "exponential_decay_length_penalty: expected a finite factor, found %g",
                       opts->decay_factor);
    return check_ids("eos_token_id with exponential_decay_length_penalty", opts->eos_ids, opts->eos_count, vocabulary,
                     err);
}

static int check_warpers(const b2_generate_opts *opts, b2_err *err)
{
    const double temperature = opts->temperature, top_p = opts->top_p, min_p = opts->min_p, top_h = opts->top_h;
    const double typical_p = opts->typical_p, epsilon = opts->epsilon_cutoff, eta = opts->eta_cutoff;
    if (!opts->do_sample)
        return 0;
    if (opts->top_k < 0)
        return b2_fail(err, B2_E_VALUE, "top_k: expected at least 0, found %lld", (long long)opts->top_k);
    return check_range("temperature", temperature, (float)temperature > 0.0f && isfinite((float)temperature),
                       "above 0", err) < 0 ||
                   check_range("top_h", top_h, top_h >= 0.0 && top_h <= 1.0, "in (0, 1]", err) < 0 ||
                   check_range("top_p", top_p, top_p >= 0.0 && top_p <= 1.0, "from 0 to 1", err) < 0 ||
                   check_range("min_p", min_p, min_p >= 0.0 && min_p <= 1.0, "from 0 to 1", err) < 0 ||
                   check_range("typical_p", typical_p, typical_p > 0.0 && typical_p <= 1.0, "in (0, 1]", err) < 0 ||
                   check_range("epsilon_cutoff", epsilon, epsilon >= 0.0 && epsilon < 1.0, "in [0, 1)", err) < 0 ||
                   check_range("eta_cutoff", eta, eta >= 0.0 && eta < 1.0, "in [0, 1)", err) < 0
               ? -1
               : 0;
}

static int check_forced(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    if (check_ids("forced_bos_token_id", opts->forced_bos_ids, opts->forced_bos_count, vocabulary, err) < 0)
        return -1;
    return check_ids("forced_eos_token_id", opts->forced_eos_ids, opts->forced_eos_count, vocabulary, err);
}

int b2_rules_check(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err)
{
    if (!(opts->repetition_penalty > 0.0f) || !isfinite(opts->repetition_penalty))
        return b2_fail(err, B2_E_VALUE, "repetition_penalty: expected a number above 0, found %g",
                       (double)opts->repetition_penalty);
    if (opts->no_repeat_ngram_size < 0)
        return b2_fail(err, B2_E_VALUE, "no_repeat_ngram_size: expected at least 0, found %d",
                       opts->no_repeat_ngram_size);
    if (check_words("bad_words_ids", opts->bad_words, opts->bad_word_offsets, opts->bad_word_count, vocabulary, err) < 0 ||
        check_ids("suppress_tokens", opts->suppress_ids, opts->suppress_count, vocabulary, err) < 0 ||
        check_ids("begin_suppress_tokens", opts->begin_suppress_ids, opts->begin_suppress_count, vocabulary, err) < 0 ||
        check_biases(opts, vocabulary, err) < 0 || check_forced(opts, vocabulary, err) < 0 ||
        check_decay(opts, vocabulary, err) < 0)
        return -1;
    return check_warpers(opts, err);
}
