/* Beam search as transformers 5.23 defines it (GenerationMixin._beam_search), each item of the batch on its own.
 *
 * An item has num_beams running beams with summed log-probabilities s, and num_beams slots for ended hypotheses. With
 * n new tokens per beam, a step is:
 *   candidates  the K = max(2, 1 + end tokens) * num_beams largest of s[beam] + rules(log_softmax(logits))[token]
 *   running     the num_beams best candidates, those that end (end token or limit) 1e9 worse
 *   slots       the num_beams best of the old slots and the candidates' score / n^length_penalty, where a candidate
 *               that does not end, or is not among the first num_beams, is 1e9 worse; all are once the item may stop
 *   stop        when no running beam can beat the worst slot (early_stopping picks the estimate), when all slots are
 *               taken and early_stopping is true, or when every candidate ends
 * The -1e9 are part of the definition: an empty slot scores -1e9, and so do all beams but the first at the beginning,
 * because they hold the same prompt. Sums are fp32 in upstream's order. Equal scores fall as torch.topk has them (topk.h).
 *
 * Upstream computes until the last item of the batch stops; a stopped item cannot change there, since whatever it
 * still finds is 1e9 worse than its slots. Here its rows are not computed any more.
 * Everything is allocated before the first step and freed here. */
#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "generate/scores.h"
#include "generate/search.h"
#include "generate/topk.h"

static const float WORSE = -1.0e9f;

typedef struct slot {
    float score;
    int ended; /* 0: empty, or a beam that only fills the place */
    int64_t length;
} slot;

typedef enum verdict { GOES_ON, STOPS, FORBIDDEN } verdict;

typedef struct beams {
    b2_search *search;
    int64_t items;      /* that go on, in ascending order in `item` */
    int64_t step;       /* new tokens that each running beam has */
    int64_t width;      /* room for new tokens in a row of `said` and `kept` */
    int64_t candidates; /* K */
    int64_t sortable;   /* elements of one item's sort scratch */
    int32_t *item;      /* [B] */
    uint8_t *stopping;  /* [B] by item number: upstream's is_early_stop_heuristic_unsatisfied, negated */
    verdict *verdicts;  /* [B] of item[i] */
    uint8_t *broken;    /* [B*num_beams] of a row of `scores` */
    float *sums;        /* [B, num_beams] s, by item number */
    int32_t *row;       /* [B*num_beams] the step's arguments */
    int32_t *parent;
    int32_t *token;
    int32_t *said[2];   /* [B, num_beams, width] new tokens of the running beams; now and next */
    slot *slots[2];     /* [B, num_beams] */
    int32_t *kept[2];   /* [B, num_beams, width] new tokens of the slots */
    float *scores;      /* [items * num_beams, V], packed in the order of `item` */
    int64_t stride;     /* bytes of one row's scratch */
    char *scratch;      /* [B*num_beams, stride] of the rules */
    b2_scored *sorted;  /* [B, sortable] */
    float *merged;      /* [B, num_beams + K] */
    b2_scored *best;    /* [B, K] candidates: score, beam * V + token */
    uint8_t *ends;      /* [B, K] */
    int now;            /* which of the pairs is current */
} beams;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int reserve_rows(beams *g, size_t rows, b2_err *err)
{
    const b2_search *search = g->search;
    size_t vocabulary = (size_t)search->step->vocabulary;
    g->broken = b2_alloc_zeroed(rows, sizeof *g->broken, "beam search flags", err);
    g->sums = b2_alloc(rows, sizeof *g->sums, "beam search sums", err);
    g->row = b2_alloc(rows, sizeof *g->row, "beam search rows", err);
    g->parent = b2_alloc(rows, sizeof *g->parent, "beam search parents", err);
    g->token = b2_alloc(rows, sizeof *g->token, "beam search tokens", err);
    g->scores = b2_alloc(rows, vocabulary * sizeof *g->scores, "beam search scores", err);
    g->stride = b2_rules_scratch(search->opts, search->step->vocabulary, search->longest + g->width);
    g->scratch = b2_alloc(rows, (size_t)g->stride, "beam search scratch", err);
    for (int i = 0; i < 2; i++) {
        g->said[i] = b2_alloc(rows, (size_t)g->width * sizeof *g->said[i], "running beams", err);
        g->kept[i] = b2_alloc(rows, (size_t)g->width * sizeof *g->kept[i], "ended beams", err);
        g->slots[i] = b2_alloc(rows, sizeof *g->slots[i], "ended beams", err);
        if (!g->said[i] || !g->kept[i] || !g->slots[i])
            return -1;
    }
    return g->broken && g->sums && g->row && g->parent && g->token && g->scores && g->scratch ? 0 : -1;
}

static int reserve(beams *g, b2_err *err)
{
    const b2_search *search = g->search;
    size_t items = (size_t)search->prompts->rows;
    int64_t beam_count = search->opts->num_beams;
    g->width = search->width;
    g->candidates = larger(2, 1 + search->opts->eos_count) * beam_count;
    g->sortable = larger(b2_topk_scratch(beam_count * search->step->vocabulary, g->candidates),
                         beam_count + g->candidates);
    g->item = b2_alloc(items, sizeof *g->item, "beam search items", err);
    g->stopping = b2_alloc_zeroed(items, sizeof *g->stopping, "beam search flags", err);
    g->verdicts = b2_alloc(items, sizeof *g->verdicts, "beam search verdicts", err);
    g->sorted = b2_alloc(items, (size_t)g->sortable * sizeof *g->sorted, "beam search selection", err);
    g->merged = b2_alloc(items, (size_t)(beam_count + g->candidates) * sizeof *g->merged, "beam search merge", err);
    g->best = b2_alloc(items, (size_t)g->candidates * sizeof *g->best, "beam search candidates", err);
    g->ends = b2_alloc(items, (size_t)g->candidates * sizeof *g->ends, "beam search flags", err);
    if (!g->item || !g->stopping || !g->verdicts || !g->sorted || !g->merged || !g->best || !g->ends)
        return -1;
    return reserve_rows(g, items * (size_t)beam_count, err);
}

static void release(beams *g)
{
    for (int i = 0; i < 2; i++) {
        b2_free(g->said[i]);
        b2_free(g->kept[i]);
        b2_free(g->slots[i]);
    }
    b2_free(g->item);
    b2_free(g->stopping);
    b2_free(g->verdicts);
    b2_free(g->broken);
    b2_free(g->sums);
    b2_free(g->row);
    b2_free(g->parent);
    b2_free(g->token);
    b2_free(g->scores);
    b2_free(g->scratch);
    b2_free(g->sorted);
    b2_free(g->merged);
    b2_free(g->best);
    b2_free(g->ends);
}

static void begin(beams *g)
{
    int beam_count = g->search->opts->num_beams;
    g->items = g->search->prompts->rows;
    for (int32_t b = 0; b < g->items; b++) {
        g->item[b] = b;
        for (int j = 0; j < beam_count; j++) {
            g->sums[b * beam_count + j] = j == 0 ? 0.0f : WORSE;
            g->slots[0][b * beam_count + j] = (slot){.score = WORSE};
        }
    }
}

/* Logits of row i of `scores` into rules(log_softmax(logits)), for running beam `beam` of item number `item`. */
static void score_row(beams *g, int64_t i, int64_t item, int64_t beam)
{
    const b2_search *search = g->search;
    int64_t vocabulary = search->step->vocabulary;
    float *scores = g->scores + i * vocabulary;
    int broken = b2_scores_broken(scores, vocabulary);
    g->broken[i] = broken && !search->opts->remove_invalid_values;
    if (g->broken[i])
        return;
    if (broken) /* one NaN or +Inf makes the whole softmax NaN */
        b2_scores_fill(scores, vocabulary, NAN);
    else
        b2_scores_log_softmax(scores, vocabulary);
    const int32_t *said = g->said[g->now] + (item * search->opts->num_beams + beam) * g->width;
    b2_history history = b2_search_history(search, item, said, g->step);
    b2_rules_apply(scores, vocabulary, &history, search->opts, g->scratch + i * g->stride);
}

static void score_prompt(void *argument, int64_t i, int worker)
{
    (void)worker;
    beams *g = argument;
    score_row(g, i, i, 0);
}

static void score_beam(void *argument, int64_t i, int worker)
{
    (void)worker;
    beams *g = argument;
    int beam_count = g->search->opts->num_beams;
    int64_t item = g->item[i / beam_count], beam = i % beam_count;
    score_row(g, i, item, beam);
    b2_scores_add(g->scores + i * g->search->step->vocabulary, g->search->step->vocabulary,
                  g->sums[item * beam_count + beam]);
}

/* After the prefill `scores` holds one row per item; its beams all see that row. Backwards, because the rows of an
 * item lie at or behind the one they come from. */
static void spread_prompts(beams *g)
{
    int beam_count = g->search->opts->num_beams;
    int64_t vocabulary = g->search->step->vocabulary;
    for (int64_t b = g->items - 1; b >= 0; b--)
        for (int64_t j = beam_count - 1; j >= 0; j--) {
            float *to = g->scores + (b * beam_count + j) * vocabulary;
            memmove(to, g->scores + b * vocabulary, (size_t)vocabulary * sizeof *to);
            b2_scores_add(to, vocabulary, g->sums[b * beam_count + j]);
        }
}

static int check_rows(const beams *g, int64_t rows, int64_t rows_per_item, b2_err *err)
{
    for (int64_t i = 0; i < rows; i++)
        if (g->broken[i])
            return b2_fail(err, B2_E_NUMERIC, "logits of row %lld, beam %lld at step %lld: NaN or Inf",
                           (long long)g->item[i / rows_per_item], (long long)(i % rows_per_item), (long long)g->step);
    return 0;
}

static int all_ended(const slot *slots, int count)
{
    for (int j = 0; j < count; j++)
        if (!slots[j].ended)
            return 0;
    return 1;
}

static int any_ended(const slot *slots, int count)
{
    for (int j = 0; j < count; j++)
        if (slots[j].ended)
            return 1;
    return 0;
}

static void copy_tokens(int32_t *to, const int32_t *from, int64_t count)
{
    memcpy(to, from, (size_t)count * sizeof *to);
}

static void choose_candidates(const beams *g, int64_t i, b2_scored *best, uint8_t *ends)
{
    const b2_search *search = g->search;
    int64_t vocabulary = search->step->vocabulary, all = search->opts->num_beams * vocabulary;
    b2_scored *sorted = g->sorted + i * g->sortable;
    b2_topk(sorted, g->scores + i * all, all, g->candidates);
    int at_limit = g->step + 1 >= search->limits[g->item[i]];
    for (int64_t c = 0; c < g->candidates; c++) {
        best[c] = sorted[c];
        ends[c] = at_limit || b2_rules_is_eos(search->opts, (int32_t)(best[c].index % vocabulary));
    }
}

/* The running beams of the next step, and what to ask the model for. */
static void choose_running(beams *g, int64_t i, const b2_scored *best, const uint8_t *ends)
{
    int beam_count = g->search->opts->num_beams;
    int64_t vocabulary = g->search->step->vocabulary, first = (int64_t)g->item[i] * beam_count;
    b2_scored *sorted = g->sorted + i * g->sortable;
    float *values = g->merged + i * (beam_count + g->candidates);
    for (int64_t c = 0; c < g->candidates; c++)
        values[c] = ends[c] ? best[c].value + WORSE : best[c].value;
    b2_topk(sorted, values, g->candidates, beam_count);
    for (int j = 0; j < beam_count; j++) {
        int32_t index = best[sorted[j].index].index;
        int64_t parent = first + index / vocabulary;
        int32_t *next = g->said[!g->now] + (first + j) * g->width;
        copy_tokens(next, g->said[g->now] + parent * g->width, g->step);
        next[g->step] = (int32_t)(index % vocabulary);
        g->sums[first + j] = sorted[j].value;
        g->row[i * beam_count + j] = (int32_t)(first + j);
        g->parent[i * beam_count + j] = (int32_t)parent;
        g->token[i * beam_count + j] = next[g->step];
    }
}

static float final_score(const beams *g, int64_t item, float sum, int takes_part, int full)
{
    float score = sum / (float)pow((double)(g->step + 1), g->search->opts->length_penalty);
    if (full)
        score += WORSE;
    if (g->stopping[item])
        score += WORSE;
    return takes_part ? score : score + WORSE;
}

/* The slots after this step. */
static void choose_slots(beams *g, int64_t i, const b2_scored *best, const uint8_t *ends)
{
    const b2_generate_opts *opts = g->search->opts;
    int beam_count = opts->num_beams;
    int64_t vocabulary = g->search->step->vocabulary, item = g->item[i], first = item * beam_count;
    const slot *old = g->slots[g->now] + first;
    slot *new = g->slots[!g->now] + first;
    b2_scored *sorted = g->sorted + i * g->sortable;
    float *merged = g->merged + i * (beam_count + g->candidates);
    int full = opts->early_stopping == B2_EARLY_STOPPING_TRUE && all_ended(old, beam_count);
    for (int j = 0; j < beam_count; j++)
        merged[j] = old[j].score;
    for (int64_t c = 0; c < g->candidates; c++)
        merged[beam_count + c] = final_score(g, item, best[c].value, ends[c] && c < beam_count, full);
    b2_topk(sorted, merged, beam_count + g->candidates, beam_count);
    for (int j = 0; j < beam_count; j++) {
        int64_t from = sorted[j].index, c = from - beam_count;
        int32_t *to = g->kept[!g->now] + (first + j) * g->width;
        if (c < 0) {
            new[j] = old[from];
            copy_tokens(to, g->kept[g->now] + (first + from) * g->width, old[from].length);
            continue;
        }
        new[j] = (slot){sorted[j].value, ends[c] && c < beam_count, g->step + 1};
        copy_tokens(to, g->said[g->now] + (first + best[c].index / vocabulary) * g->width, g->step);
        to[g->step] = (int32_t)(best[c].index % vocabulary);
    }
}

/* Could the best running beam still beat a slot? The estimate of its final score is upstream's: with the present
 * length, or, for "never" and a penalty that favours length, with the limit. */
static int may_improve(const beams *g, int64_t item)
{
    const b2_generate_opts *opts = g->search->opts;
    int64_t first = item * opts->num_beams;
    const slot *slots = g->slots[!g->now] + first;
    int64_t length = g->step + 1;
    if (opts->early_stopping == B2_EARLY_STOPPING_NEVER && opts->length_penalty > 0.0)
        length = g->search->limits[item];
    float best = g->sums[first] / (float)pow((double)length, opts->length_penalty);
    float worst = slots[0].score;
    for (int j = 1; j < opts->num_beams; j++)
        worst = slots[j].score < worst ? slots[j].score : worst;
    for (int j = 0; j < opts->num_beams; j++)
        if (best > (slots[j].ended ? worst : WORSE))
            return 1;
    return 0;
}

static verdict judge(beams *g, int64_t item, const uint8_t *ends)
{
    const b2_generate_opts *opts = g->search->opts;
    int all_end = 1;
    for (int64_t c = 0; c < g->candidates; c++)
        all_end &= ends[c];
    g->stopping[item] |= !may_improve(g, item);
    int full = opts->early_stopping == B2_EARLY_STOPPING_TRUE &&
               all_ended(g->slots[!g->now] + item * opts->num_beams, opts->num_beams);
    return g->stopping[item] || full || all_end ? STOPS : GOES_ON;
}

static void advance_item(void *argument, int64_t i, int worker)
{
    (void)worker;
    beams *g = argument;
    int beam_count = g->search->opts->num_beams;
    int64_t item = g->item[i];
    b2_scored *best = g->best + i * g->candidates;
    uint8_t *ends = g->ends + i * g->candidates;
    choose_candidates(g, i, best, ends);
    /* Without any way to go on, what has ended is the result; with nothing ended there is none. */
    if (best[0].value == -INFINITY && !any_ended(g->slots[g->now] + item * beam_count, beam_count)) {
        g->verdicts[i] = FORBIDDEN;
        return;
    }
    choose_slots(g, i, best, ends);
    choose_running(g, i, best, ends);
    g->verdicts[i] = judge(g, item, ends);
}

static void give_out(beams *g, int64_t item)
{
    b2_generated *out = g->search->out;
    const b2_generate_opts *opts = g->search->opts;
    for (int64_t j = 0; j < opts->num_return_sequences; j++) {
        int64_t from = item * opts->num_beams + j, to = item * opts->num_return_sequences + j;
        const slot *result = g->slots[!g->now] + from;
        copy_tokens(out->ids + to * g->width, g->kept[!g->now] + from * g->width, result->length);
        out->lengths[to] = result->length;
        out->scores[to] = result->score;
    }
}

/* Hands out the items that stop and keeps those that go on, in order. */
static int settle(beams *g, b2_err *err)
{
    int beam_count = g->search->opts->num_beams;
    int64_t left = 0;
    for (int64_t i = 0; i < g->items; i++) {
        if (g->verdicts[i] == FORBIDDEN)
            return b2_fail(err, B2_E_VALUE, "row %d at step %lld: every token is forbidden (suppress_tokens, "
                           "bad_words_ids, no_repeat_ngram_size and min_length leave none)", (int)g->item[i],
                           (long long)g->step);
        if (g->verdicts[i] == STOPS) {
            give_out(g, g->item[i]);
            continue;
        }
        g->item[left] = g->item[i];
        size_t bytes = (size_t)beam_count * sizeof *g->row;
        memmove(g->row + left * beam_count, g->row + i * beam_count, bytes);
        memmove(g->parent + left * beam_count, g->parent + i * beam_count, bytes);
        memmove(g->token + left * beam_count, g->token + i * beam_count, bytes);
        left++;
    }
    g->items = left;
    g->step++;
    g->now = !g->now;
    return 0;
}

static int score_prompts(beams *g, b2_err *err)
{
    b2_search *search = g->search;
    if (search->step->prefill(search->step, g->scores, err) < 0 ||
        b2_search_run(search, g->items, search->step->vocabulary, score_prompt, g, err) < 0 ||
        check_rows(g, g->items, 1, err) < 0)
        return -1;
    spread_prompts(g);
    return 0;
}

static int score_beams(beams *g, b2_err *err)
{
    b2_search *search = g->search;
    int64_t rows = g->items * search->opts->num_beams;
    search->out->steps++;
    if (search->step->advance(search->step, rows, g->row, g->parent, g->token, g->scores, err) < 0 ||
        b2_search_run(search, rows, search->step->vocabulary, score_beam, g, err) < 0)
        return -1;
    return check_rows(g, rows, search->opts->num_beams, err);
}

static int run(beams *g, b2_err *err)
{
    b2_search *search = g->search;
    begin(g);
    if (score_prompts(g, err) < 0)
        return -1;
    for (;;) {
        if (b2_cancel_poll(search->cancel))
            return b2_fail(err, B2_E_CANCEL, "cancelled");
        int64_t scores_per_item = search->opts->num_beams * search->step->vocabulary;
        if (b2_search_run(search, g->items, scores_per_item, advance_item, g, err) < 0 || settle(g, err) < 0)
            return -1;
        if (g->items == 0)
            return 0;
        if (score_beams(g, err) < 0)
            return -1;
    }
}

int b2_search_beams(b2_search *search, b2_err *err)
{
    beams g = {.search = search};
    int status = reserve(&g, err) < 0 || run(&g, err) < 0 ? -1 : 0;
    release(&g);
    return status;
}
