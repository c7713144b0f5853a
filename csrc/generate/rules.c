#include "generate/rules.h"

#include <math.h>

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

/* Every id of the history is penalised once however often it occurs: read all scores first, then write. */
static void penalise_repetition(float *scores, int64_t vocabulary, const b2_history *history, float penalty,
                                float *scratch)
{
    int64_t length = length_of(history);
    for (int64_t i = history->skip; i < length; i++) {
        int32_t id = id_at(history, i);
        float score = id >= 0 && id < vocabulary ? scores[id] : 0.0f;
        scratch[i] = score < 0.0f ? score * penalty : score / penalty;
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
        if (tail_is(history, word, length - 1))
            forbid(scores, vocabulary, word[length - 1]);
    }
}

static int too_short(const b2_history *history, const b2_generate_opts *opts)
{
    return length_of(history) < opts->min_length || history->made_length < opts->min_new_tokens;
}

static void forbid_all(float *scores, int64_t vocabulary, const int32_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        forbid(scores, vocabulary, ids[i]);
}

void b2_rules_apply(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                    float *scratch)
{
    if (opts->repetition_penalty != 1.0f)
        penalise_repetition(scores, vocabulary, history, opts->repetition_penalty, scratch);
    if (opts->no_repeat_ngram_size > 0)
        forbid_repeated_ngrams(scores, vocabulary, history, opts->no_repeat_ngram_size);
    forbid_bad_words(scores, vocabulary, history, opts);
    if (too_short(history, opts))
        forbid_all(scores, vocabulary, opts->eos_ids, opts->eos_count);
    forbid_all(scores, vocabulary, opts->suppress_ids, opts->suppress_count);
}

int b2_rules_is_eos(const b2_generate_opts *opts, int32_t id)
{
    for (int64_t i = 0; i < opts->eos_count; i++)
        if (opts->eos_ids[i] == id)
            return 1;
    return 0;
}
