/* Beam search as transformers 5.23 defines it (GenerationMixin._beam_search), each item of the batch on its own.
 *
 * An item has num_beams running beams with summed log-probabilities s, and num_beams slots for ended hypotheses. With
 * n new tokens per beam, a step is:
 *   candidates  the K = max(2, 1 + end tokens) * num_beams largest of s[beam] + rules(log_softmax(logits))[token], or as
 *               many draws without replacement from their softmax, in the order of drawing
 *   running     the num_beams best candidates, those that end (end token or limit) 1e9 worse
 *   slots       the num_beams best of the old slots and the candidates' score / n^length_penalty, where a candidate
 *               that does not end, or is not among the first num_beams, is 1e9 worse; all are once the item may stop
 *   stop        when no running beam can beat the worst slot (early_stopping picks the estimate), when all slots are
 *               taken and early_stopping is true, or when every candidate ends
 * The -1e9 are part of the definition: an empty slot scores -1e9, and so do all beams but the first at the beginning,
 * because they hold the same prompt. Sums are fp32 in upstream's order. Equal scores fall as torch.topk has them (topk.h).
 *
 * Upstream computes until the last item of the batch stops; a stopped item cannot change there, since whatever it
 * still finds is 1e9 worse than its slots. Here its rows are not computed any more, except with hooks, which see them. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "generate/draw.h"
#include "generate/few.h"
#include "generate/search.h"
#include "generate/topk.h"

static const float WORSE = -1.0e9f;

typedef struct slot {
    float score;
    int ended; /* 0: empty, or a beam that only fills the place */
    int64_t length;
} slot;

/* What a step has made of an item. */
typedef struct outcome {
    int forbidden; /* no token is allowed and nothing has ended */
    int improves;  /* a running beam might still beat a slot */
    int full;      /* early_stopping and all slots taken */
    int all_end;   /* no candidate goes on */
} outcome;

/* Everything by place; running beams and slots are double, seat->now says which half is current. */
typedef struct beams {
    int beam_count;
    int64_t candidates; /* K */
    int64_t sortable;   /* elements of one item's sort scratch */
    uint8_t *stopping;  /* [P] upstream's is_early_stop_heuristic_unsatisfied, negated */
    outcome *outcomes;  /* [P] */
    float *sums;        /* [P, num_beams] s */
    slot *slots[2];     /* [P, num_beams] */
    int32_t *kept[2];   /* [P, num_beams, width] new tokens of the slots */
    int32_t *paths[2];  /* [P, num_beams, width] of the running beams: which beam each token was appended to */
    int32_t *kept_paths[2]; /* of the slots */
    b2_scored *sorted;  /* [P, sortable] */
    float *merged;      /* [P, num_beams + K] */
    b2_scored *best;    /* [P, K] candidates: score, beam * V + token */
    uint8_t *ends;      /* [P, K] */
    float *races;       /* [P, num_beams * V] when sampling */
    int32_t *shown;     /* [P, K, width] candidates' tokens for hooks->stop */
} beams;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int reserve_pairs(const b2_search *s, beams *g, b2_err *err)
{
    size_t rows = (size_t)(s->size.places * g->beam_count), width = (size_t)s->width * sizeof(int32_t);
    for (int i = 0; i < 2; i++) {
        g->slots[i] = b2_alloc(rows, sizeof *g->slots[i], "ended beams", err);
        g->kept[i] = b2_alloc(rows, width, "ended beams", err);
        g->paths[i] = b2_alloc(rows, width, "paths of beams", err);
        g->kept_paths[i] = b2_alloc(rows, width, "paths of beams", err);
        if (!g->slots[i] || !g->kept[i] || !g->paths[i] || !g->kept_paths[i])
            return -1;
    }
    return 0;
}

static int beam_reserve(b2_search *s, b2_err *err)
{
    beams *g = s->choosing = b2_alloc_zeroed(1, sizeof *g, "beam search", err);
    if (!g)
        return -1;
    size_t places = (size_t)s->size.places;
    int64_t beam_count = g->beam_count = s->opts->num_beams, all = beam_count * s->step->vocabulary;
    g->candidates = larger(2, 1 + s->opts->eos_count) * beam_count;
    size_t k = (size_t)g->candidates;
    g->sortable = larger(b2_topk_scratch(all, g->candidates), beam_count + g->candidates);
    g->stopping = b2_alloc_zeroed(places, sizeof *g->stopping, "beam search flags", err);
    g->outcomes = b2_alloc(places, sizeof *g->outcomes, "beam search outcomes", err);
    g->sums = b2_alloc(places, (size_t)beam_count * sizeof *g->sums, "beam search sums", err);
    g->sorted = b2_alloc(places, (size_t)g->sortable * sizeof *g->sorted, "beam search selection", err);
    g->merged = b2_alloc(places, ((size_t)beam_count + k) * sizeof *g->merged, "beam search merge", err);
    g->best = b2_alloc(places, k * sizeof *g->best, "beam search candidates", err);
    g->ends = b2_alloc(places, k * sizeof *g->ends, "beam search flags", err);
    if (!g->stopping || !g->outcomes || !g->sums || !g->sorted || !g->merged || !g->best || !g->ends)
        return -1;
    if (s->opts->do_sample && !(g->races = b2_alloc(places, (size_t)all * sizeof *g->races, "beam search draws", err)))
        return -1;
    if (s->opts->hooks && s->opts->hooks->stop &&
        !(g->shown = b2_alloc(places * k, (size_t)s->width * sizeof *g->shown, "candidates", err)))
        return -1;
    return reserve_pairs(s, g, err);
}

static void beam_release(b2_search *s)
{
    beams *g = s->choosing;
    if (!g)
        return;
    for (int i = 0; i < 2; i++) {
        b2_free(g->slots[i]);
        b2_free(g->kept[i]);
        b2_free(g->paths[i]);
        b2_free(g->kept_paths[i]);
    }
    void *blocks[] = {g->stopping, g->outcomes, g->sums, g->sorted, g->merged, g->best, g->ends, g->races, g->shown};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        b2_free(blocks[i]);
    b2_free(g);
}

static void beam_enter(b2_search *s, int32_t place)
{
    beams *g = s->choosing;
    int64_t first = (int64_t)place * g->beam_count;
    g->stopping[place] = 0;
    for (int64_t r = first; r < first + g->beam_count; r++) {
        g->sums[r] = r == first ? 0.0f : WORSE;
        g->slots[0][r] = (slot){.score = WORSE};
        s->alive[r] = 1;
    }
}

static float beam_addend(const b2_search *s, int64_t i)
{
    const beams *g = s->choosing;
    return g->sums[s->row[i]];
}

static float beam_slot(const b2_search *s, int64_t r)
{
    const beams *g = s->choosing;
    const slot *slots = g->slots[s->seats[r / g->beam_count].now];
    return slots[r].ended ? slots[r].score : B2_CHOICE_EMPTY;
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

/* The K candidates of the k-th item of the group, all of whose beams have a row in `scores`. */
static void choose_candidates(b2_search *s, int64_t k)
{
    beams *g = s->choosing;
    int32_t place = s->group[k];
    const b2_seat *seat = &s->seats[place];
    int64_t vocabulary = s->step->vocabulary, all = g->beam_count * vocabulary;
    const float *scores = b2_search_scores(s, k * g->beam_count), *values = scores;
    b2_scored *best = g->best + place * g->candidates, *sorted = g->sorted + place * g->sortable;
    if (s->opts->do_sample) {
        b2_draws draws = b2_draws_of(s->opts->seed, seat->item.key, 0, seat->step);
        b2_draws_race(&draws, g->races + place * all, scores, all);
        values = g->races + place * all;
    }
    const b2_scored *few = s->few ? b2_few_candidates(s, k) : NULL;
    if (!few)
        b2_topk(sorted, values, all, g->candidates);
    for (int64_t c = 0; c < g->candidates; c++) {
        int32_t index = few ? few[c].index : sorted[c].index;
        float score = few ? few[c].value : scores[index];
        /* Huge biases add up to Inf, which would be NaN with the next -Inf. */
        best[c] = (b2_scored){score > FLT_MAX ? FLT_MAX : score, index};
        g->ends[place * g->candidates + c] =
            seat->step + 1 >= seat->limit || b2_rules_is_eos(s->opts, (int32_t)(index % vocabulary));
    }
}

static void candidates_tile(void *argument, int64_t k, int worker)
{
    (void)worker;
    choose_candidates(argument, k);
}

/* to = from [length], then `last`. */
static void extend(int32_t *to, const int32_t *from, int64_t length, int32_t last)
{
    copy_tokens(to, from, length);
    to[length] = last;
}

/* The running beams of the next step, and what to ask the model for. */
static void choose_running(b2_search *s, int32_t place)
{
    beams *g = s->choosing;
    const b2_seat *seat = &s->seats[place];
    int now = seat->now;
    int64_t vocabulary = s->step->vocabulary, first = (int64_t)place * g->beam_count;
    const b2_scored *best = g->best + place * g->candidates;
    const uint8_t *ends = g->ends + place * g->candidates;
    b2_scored *sorted = g->sorted + place * g->sortable;
    float *values = g->merged + place * (g->beam_count + g->candidates);
    for (int64_t c = 0; c < g->candidates; c++)
        values[c] = ends[c] ? best[c].value + WORSE : best[c].value;
    b2_topk(sorted, values, g->candidates, g->beam_count);
    for (int64_t r = first; r < first + g->beam_count; r++) {
        const b2_scored *chosen = &sorted[r - first];
        int32_t index = best[chosen->index].index;
        int64_t beam = index / vocabulary, from = (first + beam) * s->width, to = r * s->width;
        s->token[r] = (int32_t)(index % vocabulary);
        s->parent[r] = (int32_t)(first + beam);
        g->sums[r] = chosen->value;
        extend(s->said[!now] + to, s->said[now] + from, seat->step, s->token[r]);
        extend(g->paths[!now] + to, g->paths[now] + from, seat->step, (int32_t)beam);
    }
}

static float final_score(const b2_search *s, int32_t place, float sum, int takes_part, int full)
{
    const beams *g = s->choosing;
    float score = sum / (float)pow((double)(s->seats[place].step + 1), s->opts->length_penalty);
    if (full)
        score += WORSE;
    if (g->stopping[place])
        score += WORSE;
    return takes_part ? score : score + WORSE;
}

/* The slots after this step. */
static void choose_slots(b2_search *s, int32_t place)
{
    beams *g = s->choosing;
    const b2_seat *seat = &s->seats[place];
    int now = seat->now, beam_count = g->beam_count;
    int64_t vocabulary = s->step->vocabulary, first = (int64_t)place * beam_count;
    const b2_scored *best = g->best + place * g->candidates;
    const uint8_t *ends = g->ends + place * g->candidates;
    const slot *old = g->slots[now] + first;
    slot *new = g->slots[!now] + first;
    b2_scored *sorted = g->sorted + place * g->sortable;
    float *merged = g->merged + place * (beam_count + g->candidates);
    int full = s->opts->early_stopping == B2_EARLY_STOPPING_TRUE && all_ended(old, beam_count);
    for (int j = 0; j < beam_count; j++)
        merged[j] = old[j].score;
    for (int64_t c = 0; c < g->candidates; c++)
        merged[beam_count + c] = final_score(s, place, best[c].value, ends[c] && c < beam_count, full);
    b2_topk(sorted, merged, beam_count + g->candidates, beam_count);
    for (int j = 0; j < beam_count; j++) {
        int64_t from = sorted[j].index, c = from - beam_count, to = (first + j) * s->width;
        if (c < 0) {
            new[j] = old[from];
            copy_tokens(g->kept[!now] + to, g->kept[now] + (first + from) * s->width, old[from].length);
            copy_tokens(g->kept_paths[!now] + to, g->kept_paths[now] + (first + from) * s->width, old[from].length);
            continue;
        }
        int64_t beam = best[c].index / vocabulary;
        new[j] = (slot){sorted[j].value, ends[c] && c < beam_count, seat->step + 1};
        extend(g->kept[!now] + to, s->said[now] + (first + beam) * s->width, seat->step,
               (int32_t)(best[c].index % vocabulary));
        extend(g->kept_paths[!now] + to, g->paths[now] + (first + beam) * s->width, seat->step, (int32_t)beam);
    }
}

/* Could the best running beam still beat a slot? The estimate of its final score is upstream's: with the present
 * length, or, for "never" and a penalty that favours length, with the limit. */
static int may_improve(const b2_search *s, int32_t place)
{
    const beams *g = s->choosing;
    const b2_generate_opts *opts = s->opts;
    const b2_seat *seat = &s->seats[place];
    int64_t first = (int64_t)place * g->beam_count;
    const slot *slots = g->slots[!seat->now] + first;
    int64_t length = seat->step + 1;
    if (opts->early_stopping == B2_EARLY_STOPPING_NEVER && opts->length_penalty > 0.0)
        length = seat->limit;
    float best = g->sums[first] / (float)pow((double)length, opts->length_penalty);
    float worst = slots[0].score;
    for (int j = 1; j < g->beam_count; j++)
        worst = slots[j].score < worst ? slots[j].score : worst;
    for (int j = 0; j < g->beam_count; j++)
        if (best > (slots[j].ended ? worst : WORSE))
            return 1;
    return 0;
}

static outcome judge(b2_search *s, int32_t place)
{
    beams *g = s->choosing;
    const b2_seat *seat = &s->seats[place];
    const uint8_t *ends = g->ends + place * g->candidates;
    outcome result = {.all_end = 1};
    for (int64_t c = 0; c < g->candidates; c++)
        result.all_end &= ends[c];
    g->stopping[place] |= !may_improve(s, place);
    result.improves = !g->stopping[place];
    result.full = s->opts->early_stopping == B2_EARLY_STOPPING_TRUE &&
                  all_ended(g->slots[!seat->now] + (int64_t)place * g->beam_count, g->beam_count);
    return result;
}

static void settle_tile(void *argument, int64_t k, int worker)
{
    (void)worker;
    b2_search *s = argument;
    beams *g = s->choosing;
    int32_t place = s->group[k];
    const b2_seat *seat = &s->seats[place];
    /* Without any way to go on, what has ended is the result; with nothing ended there is none. */
    if (g->best[place * g->candidates].value == -INFINITY &&
        !any_ended(g->slots[seat->now] + (int64_t)place * g->beam_count, g->beam_count)) {
        g->outcomes[place] = (outcome){.forbidden = 1};
        return;
    }
    choose_slots(s, place);
    choose_running(s, place);
    g->outcomes[place] = judge(s, place);
}

/* Candidates for the stopping criteria, item after item. */
static int ask_hook(b2_search *s, b2_err *err)
{
    beams *g = s->choosing;
    b2_hooks *hooks = s->opts->hooks;
    if (!hooks || !hooks->stop)
        return 0;
    int64_t vocabulary = s->step->vocabulary, length = s->seats[s->group[0]].step;
    for (int64_t k = 0; k < s->group_count; k++) {
        int32_t place = s->group[k];
        for (int64_t c = place * g->candidates; c < (place + 1) * g->candidates; c++) {
            int64_t beam = (int64_t)place * g->beam_count + g->best[c].index / vocabulary;
            extend(g->shown + c * s->width, b2_search_said(s, beam), length, (int32_t)(g->best[c].index % vocabulary));
        }
    }
    b2_view view = {.rows = s->group_count * g->candidates,
                    .rows_per_item = g->candidates,
                    .length = length + 1,
                    .ids = g->shown,
                    .ld = s->width};
    return hooks->stop(hooks, &view, g->ends, err);
}

/* With hooks the whole batch stops at once, by upstream's three conditions over all items. */
static void stop_together(b2_search *s)
{
    const beams *g = s->choosing;
    int improves = 0, all_full = 1, all_end = 1;
    for (int64_t k = 0; k < s->group_count; k++) {
        const outcome *o = &g->outcomes[s->group[k]];
        improves |= o->improves;
        all_full &= o->full;
        all_end &= o->all_end;
    }
    for (int64_t k = 0; k < s->group_count; k++)
        s->seats[s->group[k]].over = !improves || all_full || all_end;
}

static int beam_choose(b2_search *s, b2_err *err)
{
    beams *g = s->choosing;
    int64_t scores_per_item = g->beam_count * s->step->vocabulary;
    if (b2_search_tiles(s, s->group_count, scores_per_item, candidates_tile, err) < 0 || ask_hook(s, err) < 0 ||
        b2_search_tiles(s, s->group_count, scores_per_item, settle_tile, err) < 0)
        return -1;
    for (int64_t k = 0; k < s->group_count; k++) {
        b2_seat *seat = &s->seats[s->group[k]];
        const outcome *o = &g->outcomes[s->group[k]];
        if (o->forbidden)
            return b2_search_forbidden(seat->item.index, seat->step, err);
        seat->over = !o->improves || o->full || o->all_end;
        seat->step++;
        seat->now = !seat->now;
    }
    if (s->opts->hooks)
        stop_together(s);
    return 0;
}

static void beam_give_out(b2_search *s, int32_t place, b2_finished *finished)
{
    const beams *g = s->choosing;
    int now = s->seats[place].now;
    int64_t first = (int64_t)place * g->beam_count;
    finished->ids = g->kept[now] + first * s->width;
    finished->beams = g->kept_paths[now] + first * s->width;
    for (int64_t j = 0; j < s->opts->num_return_sequences; j++) {
        s->lengths[j] = g->slots[now][first + j].length;
        s->final_scores[j] = g->slots[now][first + j].score;
    }
}

const b2_chooser b2_beam_chooser = {
    .reserve = beam_reserve,
    .release = beam_release,
    .enter = beam_enter,
    .addend = beam_addend,
    .slot = beam_slot,
    .choose = beam_choose,
    .give_out = beam_give_out,
};
