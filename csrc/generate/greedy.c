/* Greedy search: next = argmax(rules(logits)), the first of equals. A row ends with an end token or at its limit.
 * Everything is allocated before the first step and freed here. */
#include <math.h>

#include "core/memory.h"
#include "generate/scores.h"
#include "generate/search.h"

typedef struct greedy {
    b2_search *search;
    int64_t running;  /* rows that go on, in ascending order in `row` */
    int64_t step;     /* new tokens that each running row has */
    int32_t *row;     /* [B] */
    int32_t *token;   /* [B] what row[i] says next */
    uint8_t *broken;  /* [B] row[i] has NaN or +Inf logits */
    float *logits;    /* [B, V] */
    int64_t stride;   /* bytes of one row's scratch */
    char *scratch;    /* [B, stride] of the rules */
} greedy;

static int reserve(greedy *g, b2_err *err)
{
    const b2_search *search = g->search;
    size_t rows = (size_t)search->prompts->rows;
    g->row = b2_alloc(rows, sizeof *g->row, "greedy search rows", err);
    g->token = b2_alloc(rows, sizeof *g->token, "greedy search tokens", err);
    g->broken = b2_alloc(rows, sizeof *g->broken, "greedy search flags", err);
    g->logits = b2_alloc(rows, (size_t)search->step->vocabulary * sizeof *g->logits, "greedy search logits", err);
    g->stride = b2_rules_scratch(search->opts, search->step->vocabulary, search->longest + search->width);
    g->scratch = b2_alloc(rows, (size_t)g->stride, "greedy search scratch", err);
    return g->row && g->token && g->broken && g->logits && g->scratch ? 0 : -1;
}

static void release(greedy *g)
{
    b2_free(g->row);
    b2_free(g->token);
    b2_free(g->broken);
    b2_free(g->logits);
    b2_free(g->scratch);
}

static void choose(void *argument, int64_t i, int worker)
{
    (void)worker;
    greedy *g = argument;
    const b2_search *search = g->search;
    int64_t vocabulary = search->step->vocabulary;
    float *logits = g->logits + i * vocabulary;
    g->broken[i] = !search->opts->remove_invalid_values && b2_scores_broken(logits, vocabulary);
    if (g->broken[i])
        return;
    int32_t row = g->row[i];
    b2_history history = b2_search_history(search, row, search->out->ids + row * search->width, g->step);
    b2_rules_apply(logits, vocabulary, &history, search->opts, g->scratch + i * g->stride);
    g->token[i] = (int32_t)b2_scores_argmax(logits, vocabulary);
}

static int check_choice(const greedy *g, int64_t i, b2_err *err)
{
    if (g->broken[i])
        return b2_fail(err, B2_E_NUMERIC, "logits of row %d at step %lld: NaN or Inf", (int)g->row[i],
                       (long long)g->step);
    if (g->logits[i * g->search->step->vocabulary + g->token[i]] == -INFINITY)
        return b2_fail(err, B2_E_VALUE, "row %d at step %lld: every token is forbidden (suppress_tokens, "
                       "bad_words_ids, no_repeat_ngram_size and min_length leave none)", (int)g->row[i],
                       (long long)g->step);
    return 0;
}

/* Writes the tokens down and keeps the rows that go on, in order. */
static int settle(greedy *g, b2_err *err)
{
    b2_search *search = g->search;
    int64_t kept = 0;
    for (int64_t i = 0; i < g->running; i++) {
        if (check_choice(g, i, err) < 0)
            return -1;
        int32_t row = g->row[i], token = g->token[i];
        search->out->ids[row * search->width + g->step] = token;
        search->out->lengths[row] = g->step + 1;
        if (b2_rules_is_eos(search->opts, token) || g->step + 1 >= search->limits[row])
            continue;
        g->row[kept] = row;
        g->token[kept] = token;
        kept++;
    }
    g->running = kept;
    g->step++;
    return 0;
}

static int run(greedy *g, b2_err *err)
{
    b2_search *search = g->search;
    b2_step *step = search->step;
    g->running = search->prompts->rows;
    for (int32_t row = 0; row < g->running; row++)
        g->row[row] = row;
    if (step->prefill(step, g->logits, err) < 0)
        return -1;
    for (;;) {
        if (b2_cancel_poll(search->cancel))
            return b2_fail(err, B2_E_CANCEL, "cancelled");
        if (b2_search_run(search, g->running, step->vocabulary, choose, g, err) < 0 || settle(g, err) < 0)
            return -1;
        if (g->running == 0)
            return 0;
        search->out->steps++;
        if (step->advance(step, g->running, g->row, g->row, g->token, g->logits, err) < 0)
            return -1;
    }
}

int b2_search_greedy(b2_search *search, b2_err *err)
{
    greedy g = {.search = search};
    int status = reserve(&g, err) < 0 || run(&g, err) < 0 ? -1 : 0;
    release(&g);
    return status;
}
