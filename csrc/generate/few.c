#include "generate/few.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "generate/ahead.h"
#include "generate/scores.h"

enum { LISTED_MOST = 1024 };

struct b2_few {
    b2_shortlist list;
    int64_t wanted;       /* tokens to choose of an item: 1, or the candidates of beam search */
    int32_t *fixed;       /* [fixed_count] ids that rules may change at any step */
    int64_t fixed_count;
    int by_history;       /* rules change ids that have been said */
    int32_t *listed;      /* [P*W, listed_ld] */
    int64_t room;         /* k + listed_ld: entries of a row at most */
    b2_scored *entries;   /* [P*W, room] packed: scores of ids */
    int64_t *counts;      /* [P*W] */
    b2_scored *best;      /* [P*W, wanted + 1], by packed row without beams, by item of the group with them */
    uint8_t *whole;       /* likewise: the choice is made from all scores */
};

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* ---- memory ---- */

static void add_fixed(b2_few *few, const int32_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (few->fixed)
            few->fixed[few->fixed_count] = ids[i];
        few->fixed_count++;
    }
}

static void add_last_ids(b2_few *few, const int32_t *ids, const int64_t *offsets, int64_t count)
{
    for (int64_t w = 0; w < count; w++)
        add_fixed(few, ids + offsets[w + 1] - 1, 1);
}

/* Whatever rules.c writes to, but for what has been said. */
static void list_fixed(b2_few *few, const b2_generate_opts *opts)
{
    few->fixed_count = 0;
    add_fixed(few, opts->suppress_ids, opts->suppress_count);
    add_fixed(few, opts->begin_suppress_ids, opts->begin_suppress_count);
    add_fixed(few, opts->eos_ids, opts->eos_count);
    add_last_ids(few, opts->biased, opts->biased_offsets, opts->biased_count);
    add_last_ids(few, opts->bad_words, opts->bad_word_offsets, opts->bad_word_count);
}

static int looks_at_all(const b2_generate_opts *opts)
{
    return opts->hooks || opts->do_sample || opts->forced_bos_count > 0 || opts->forced_eos_count > 0 ||
           opts->remove_invalid_values || opts->renormalize_logits;
}

/* 1: the sizes are set and within bounds. */
static int fits(b2_few *few, const b2_search *s)
{
    const b2_generate_opts *opts = s->opts;
    list_fixed(few, opts);
    few->wanted = opts->num_beams > 1 ? larger(2, 1 + opts->eos_count) * opts->num_beams : 1;
    few->by_history = opts->repetition_penalty != 1.0f || opts->no_repeat_ngram_size > 0;
    few->list.listed_ld = few->fixed_count + (few->by_history ? s->size.longest + s->width : 0);
    int64_t k = opts->num_beams > 1 ? few->wanted + 1 : 1; /* one more says whether the last is the better one */
    if (k > B2_SHORTLIST_MOST || k >= s->step->vocabulary || few->list.listed_ld > LISTED_MOST)
        return 0;
    few->list.k = (int)k;
    few->list.adds_up = opts->num_beams > 1;
    few->room = k + few->list.listed_ld;
    return 1;
}

static int reserve(b2_few *few, b2_search *s, b2_err *err)
{
    size_t rows = (size_t)(s->size.places * s->rows_per_seat), room = (size_t)few->room;
    few->fixed = b2_alloc((size_t)few->fixed_count + 1, sizeof *few->fixed, "search shortlist", err);
    few->listed = b2_alloc(rows, (size_t)few->list.listed_ld * sizeof *few->listed, "search shortlist", err);
    few->entries = b2_alloc(rows, room * sizeof *few->entries, "search shortlist", err);
    few->counts = b2_alloc(rows, sizeof *few->counts, "search shortlist", err);
    few->best = b2_alloc(rows, (size_t)(few->wanted + 1) * sizeof *few->best, "search shortlist", err);
    few->whole = b2_alloc_zeroed(rows, sizeof *few->whole, "search shortlist", err);
    if (!few->fixed || !few->listed || !few->entries || !few->counts || !few->best || !few->whole)
        return -1;
    list_fixed(few, s->opts);
    few->list.listed = few->listed;
    b2_choice listing;
    memset(&listing, 0, sizeof listing); /* steps compare it, what lies between the fields too */
    listing.k = few->list.k;
    listing.by_history = few->by_history;
    listing.fixed = few->fixed_count > 0 ? few->fixed : NULL;
    listing.fixed_count = few->fixed_count;
    listing.listed_ld = few->list.listed_ld;
    if (b2_ahead_reserve(s, &listing, err) < 0)
        return -1;
    return s->step->plan(s->step, (int64_t)rows, s->choice, err);
}

int b2_few_reserve(b2_search *s, b2_err *err)
{
    b2_few few = {0};
    if (!s->step->shortlist || looks_at_all(s->opts) || !fits(&few, s))
        return 0;
    s->few = b2_alloc(1, sizeof few, "search shortlist", err);
    if (!s->few)
        return -1;
    *s->few = few;
    return reserve(s->few, s, err);
}

void b2_few_release(b2_search *s)
{
    if (!s->few)
        return;
    void *blocks[] = {s->few->fixed, s->few->listed, s->few->entries, s->few->counts, s->few->best, s->few->whole, s->few};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        b2_free(blocks[i]);
    s->few = NULL;
}

/* ---- the few scores of a row ---- */

static int32_t *listed_of(const b2_few *few, int64_t i)
{
    return few->listed + i * few->list.listed_ld;
}

static void list_row(const b2_search *s, int64_t i)
{
    const b2_few *few = s->few;
    const b2_item *item = &s->seats[s->row[i] / s->rows_per_seat].item;
    int64_t made = s->seats[s->row[i] / s->rows_per_seat].step, count = few->fixed_count;
    int32_t *listed = listed_of(few, i);
    memcpy(listed, few->fixed, (size_t)count * sizeof *listed);
    if (few->by_history) {
        memcpy(listed + count, item->ids, (size_t)item->length * sizeof *listed);
        memcpy(listed + count + item->length, b2_search_said(s, s->row[i]), (size_t)made * sizeof *listed);
        count += item->length + made;
    }
    for (; count < few->list.listed_ld; count++)
        listed[count] = -1;
}

/* As b2_scores_log_softmax does it, in beam search. */
static float prepared(const b2_search *s, int64_t i, float logit)
{
    const b2_shortlist *list = &s->few->list;
    return s->opts->num_beams > 1 ? (logit - list->tops[i]) - (float)log(list->sums[i]) : logit;
}

/* Rules see a whole row, of which they touch the listed ids alone. */
static void apply_rules(b2_search *s, int64_t i)
{
    const b2_few *few = s->few;
    const int32_t *listed = listed_of(few, i);
    float *scores = b2_search_scores(s, i);
    for (int64_t j = 0; j < few->list.listed_ld; j++)
        if (listed[j] >= 0 && listed[j] < s->step->vocabulary)
            scores[listed[j]] = prepared(s, i, few->list.listed_values[i * few->list.listed_ld + j]);
    b2_search_rules(s, i);
}

static void make_entries(b2_search *s, int64_t i)
{
    b2_few *few = s->few;
    const b2_shortlist *list = &few->list;
    const int32_t *listed = listed_of(few, i);
    float *scores = b2_search_scores(s, i);
    b2_scored *entries = few->entries + i * few->room;
    int64_t count = 0;
    for (int64_t c = i * list->k; c < (i + 1) * list->k; c++)
        if (list->ids[c] >= 0)
            entries[count++] = (b2_scored){prepared(s, i, list->values[c]), list->ids[c]};
    apply_rules(s, i);
    for (int64_t j = 0; j < list->listed_ld; j++) {
        int32_t id = listed[j];
        if (id < 0 || id >= s->step->vocabulary || isnan(scores[id]))
            continue;
        entries[count++] = (b2_scored){scores[id], id};
        scores[id] = NAN; /* has been taken; ids may be listed more than once */
    }
    few->counts[i] = count;
}

/* After a prefill, as spread() in search.c. */
static void spread(b2_search *s)
{
    b2_few *few = s->few;
    int64_t width = s->rows_per_seat;
    for (int64_t k = s->group_count - 1; k >= 0; k--)
        for (int64_t j = width - 1; j >= 0; j--) {
            memmove(few->entries + (k * width + j) * few->room, few->entries + k * few->room,
                    (size_t)few->counts[k] * sizeof *few->entries);
            few->counts[k * width + j] = few->counts[k];
            s->row[k * width + j] = (int32_t)(s->group[k] * width + j);
            s->broken[k * width + j] = 0;
        }
    s->rows = s->group_count * width;
}

/* ---- choosing ---- */

/* Into best [0 .. *count), best first, at most `most`. */
static void offer(b2_scored *best, int64_t *count, int64_t most, b2_scored entry)
{
    int64_t at = *count;
    while (at > 0 && (entry.value > best[at - 1].value ||
                      (entry.value == best[at - 1].value && entry.index < best[at - 1].index)))
        at--;
    if (at >= most)
        return;
    int64_t moved = (*count < most ? *count : most - 1) - at;
    memmove(best + at + 1, best + at, (size_t)moved * sizeof *best);
    best[at] = entry;
    *count += *count < most;
}

static int64_t gather(const b2_search *s, b2_scored *best, int64_t most, int64_t first_row, int64_t rows)
{
    const b2_few *few = s->few;
    int64_t count = 0;
    for (int64_t r = 0; r < rows; r++) {
        const b2_scored *entries = few->entries + (first_row + r) * few->room;
        for (int64_t e = 0; e < few->counts[first_row + r]; e++)
            offer(best, &count, most,
                  (b2_scored){entries[e].value, (int32_t)(r * s->step->vocabulary) + entries[e].index});
    }
    return count;
}

/* Packed row i goes by all its scores. `from`: where the step has it. */
static int fetch_row(b2_search *s, int64_t i, int64_t from, b2_err *err)
{
    if (s->step->logits(s->step, from, b2_search_scores(s, i), err) < 0)
        return -1;
    b2_search_score_row(s, i);
    return 0;
}

/* Without beams the first of the largest is chosen, equal or not. */
static int choose_single(b2_search *s, int64_t i, b2_err *err)
{
    b2_few *few = s->few;
    b2_scored *best = few->best + i * (few->wanted + 1);
    int64_t found = gather(s, best, 1, i, 1);
    few->whole[i] = found == 0 || best->value == -INFINITY || few->list.crowded[i];
    if (few->whole[i])
        return fetch_row(s, i, i, err);
    b2_search_scores(s, i)[best->index] = best->value;
    return 0;
}

/* Candidates that all differ have one order, and where the next one is worse than the last of them nobody is missing. */
static int choose_beams(b2_search *s, int64_t k, int fresh, b2_err *err)
{
    b2_few *few = s->few;
    int64_t width = s->rows_per_seat, first = k * width;
    b2_scored *best = few->best + k * (few->wanted + 1);
    int whole = gather(s, best, few->wanted + 1, first, width) <= few->wanted;
    for (int64_t c = 0; !whole && c < few->wanted; c++)
        whole = !(best[c].value > best[c + 1].value);
    for (int64_t j = 0; j < (fresh ? 1 : width); j++)
        whole |= few->list.crowded[fresh ? k : first + j] != 0;
    few->whole[k] = (uint8_t)whole;
    for (int64_t j = 0; whole && j < width; j++)
        if (fetch_row(s, first + j, fresh ? k : first + j, err) < 0)
            return -1;
    return 0;
}

int b2_few_score(b2_search *s, int fresh, b2_err *err)
{
    b2_few *few = s->few;
    for (int64_t i = 0; i < s->rows; i++)
        list_row(s, i);
    if (s->step->shortlist(s->step, s->rows, &few->list, err) < 0)
        return -1;
    for (int64_t i = 0; i < s->rows; i++) {
        make_entries(s, i);
        s->broken[i] = 0;
    }
    if (s->opts->num_beams == 1) {
        for (int64_t i = 0; i < s->rows; i++)
            if (choose_single(s, i, err) < 0)
                return -1;
        return 0;
    }
    if (fresh)
        spread(s);
    for (int64_t i = 0; i < s->rows; i++)
        for (int64_t e = 0; e < few->counts[i]; e++)
            few->entries[i * few->room + e].value += s->chooser->addend(s, i);
    for (int64_t k = 0; k < s->group_count; k++)
        if (choose_beams(s, k, fresh, err) < 0)
            return -1;
    return 0;
}

int64_t b2_few_token(const b2_search *s, int64_t i)
{
    return s->few->whole[i] ? -1 : s->few->best[i * (s->few->wanted + 1)].index;
}

const b2_scored *b2_few_candidates(const b2_search *s, int64_t k)
{
    return s->few->whole[k] ? NULL : s->few->best + k * (s->few->wanted + 1);
}
