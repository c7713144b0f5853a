/* Without beams: a row says argmax(scores), the first of equals, or draws from softmax(scores). It ends with an end token,
 * at its limit or when a hook says so. An item has num_return_sequences rows; they share nothing but the prompt. */
#include <math.h>

#include "core/memory.h"
#include "generate/draw.h"
#include "generate/few.h"
#include "generate/scores.h"
#include "generate/search.h"

typedef struct singles {
    int32_t *chosen;  /* [P*W] packed */
    uint8_t *ended;   /* [P*W] by running row */
    uint8_t *ends;    /* [P*W] packed: what hooks->stop says */
    int64_t *lengths; /* [P*W] by running row: tokens up to its end */
} singles;

static int single_reserve(b2_search *s, b2_err *err)
{
    size_t rows = (size_t)(s->size.places * s->rows_per_seat);
    singles *g = s->choosing = b2_alloc_zeroed(1, sizeof *g, "search", err);
    if (!g)
        return -1;
    g->chosen = b2_alloc(rows, sizeof *g->chosen, "search tokens", err);
    g->ended = b2_alloc_zeroed(rows, sizeof *g->ended, "search flags", err);
    g->ends = b2_alloc_zeroed(rows, sizeof *g->ends, "search flags", err);
    g->lengths = b2_alloc(rows, sizeof *g->lengths, "search lengths", err);
    return g->chosen && g->ended && g->ends && g->lengths ? 0 : -1;
}

static void single_release(b2_search *s)
{
    singles *g = s->choosing;
    if (!g)
        return;
    b2_free(g->chosen);
    b2_free(g->ended);
    b2_free(g->ends);
    b2_free(g->lengths);
    b2_free(g);
}

static void single_enter(b2_search *s, int32_t place)
{
    singles *g = s->choosing;
    for (int64_t r = place * s->rows_per_seat; r < (place + 1) * s->rows_per_seat; r++) {
        s->alive[r] = 1;
        s->parent[r] = (int32_t)r;
        g->ended[r] = 0;
        g->lengths[r] = 0;
    }
}

static void choose_tile(void *argument, int64_t i, int worker)
{
    (void)worker;
    b2_search *s = argument;
    singles *g = s->choosing;
    int64_t vocabulary = s->step->vocabulary, r = s->row[i];
    const b2_seat *seat = &s->seats[r / s->rows_per_seat];
    const float *scores = b2_search_scores(s, i);
    int64_t best = s->few ? b2_few_token(s, i) : -1;
    if (best < 0)
        best = s->broken[i] ? 0 : b2_scores_argmax(scores, vocabulary);
    if (s->opts->do_sample && !s->broken[i] && scores[best] > -INFINITY) {
        uint32_t j = (uint32_t)(r % s->rows_per_seat);
        b2_draws draws = b2_draws_of(s->opts->seed, seat->item.key, j, seat->step);
        best = b2_draws_one(&draws, scores, vocabulary);
    }
    g->chosen[i] = (int32_t)best;
}

/* transformers fills rows that have ended with pads only where there is an end token at all. */
static int32_t token_of(const b2_search *s, int64_t i)
{
    const singles *g = s->choosing;
    return g->ended[s->row[i]] && s->opts->eos_count > 0 ? s->opts->pad_id : g->chosen[i];
}

static int append(b2_search *s, b2_err *err)
{
    singles *g = s->choosing;
    for (int64_t i = 0; i < s->rows; i++) {
        int64_t r = s->row[i];
        const b2_seat *seat = &s->seats[r / s->rows_per_seat];
        if (!g->ended[r] && b2_search_scores(s, i)[g->chosen[i]] == -INFINITY)
            return b2_search_forbidden(seat->item.index, seat->step, err);
        s->token[r] = token_of(s, i);
        b2_search_said(s, r)[seat->step] = s->token[r];
        /* A row that goes on behind its end without being filled up keeps what it says. */
        if (!g->ended[r] || s->opts->eos_count == 0)
            g->lengths[r] = seat->step + 1;
    }
    return 0;
}

static int ask_hook(b2_search *s, b2_err *err)
{
    singles *g = s->choosing;
    b2_hooks *hooks = s->opts->hooks;
    if (!hooks || !hooks->stop)
        return 0;
    for (int64_t i = 0; i < s->rows; i++)
        g->ends[i] = 0;
    b2_view view = {.rows = s->rows,
                    .rows_per_item = s->rows_per_seat,
                    .length = s->seats[s->group[0]].step + 1,
                    .ids = s->said[0],
                    .ld = s->width};
    return hooks->stop(hooks, &view, g->ends, err);
}

static int single_choose(b2_search *s, b2_err *err)
{
    singles *g = s->choosing;
    if (b2_search_tiles(s, s->rows, s->step->vocabulary, choose_tile, err) < 0 || append(s, err) < 0 ||
        ask_hook(s, err) < 0)
        return -1;
    for (int64_t k = 0; k < s->group_count; k++)
        s->seats[s->group[k]].over = 1;
    for (int64_t i = 0; i < s->rows; i++) {
        int64_t r = s->row[i];
        b2_seat *seat = &s->seats[r / s->rows_per_seat];
        g->ended[r] |= b2_rules_is_eos(s->opts, s->token[r]) || seat->step + 1 >= seat->limit || g->ends[i];
        s->alive[r] = !g->ended[r] || s->opts->hooks;
        seat->over &= g->ended[r];
    }
    for (int64_t k = 0; k < s->group_count; k++)
        s->seats[s->group[k]].step++;
    return 0;
}

static void single_give_out(b2_search *s, int32_t place, b2_finished *finished)
{
    const singles *g = s->choosing;
    int64_t first = place * s->rows_per_seat;
    finished->ids = s->said[0] + first * s->width;
    for (int64_t j = 0; j < s->rows_per_seat; j++)
        s->lengths[j] = g->lengths[first + j];
}

const b2_chooser b2_single_chooser = {
    .reserve = single_reserve,
    .release = single_release,
    .enter = single_enter,
    .choose = single_choose,
    .give_out = single_give_out,
};
