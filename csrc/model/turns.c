#include "model/turns.h"

#include <stdlib.h>
#include <string.h>

#include "core/cancel.h"
#include "core/integers.h"
#include "core/memory.h"

enum { FIRST = 4, MOST = 16 };
static const size_t most_log = (size_t)1 << 20; /* what travels through pinned memory */

static size_t turn_bytes(const b2_turns *t, int64_t rows)
{
    return b2_choice_turn_bytes(b2_shortlist_bytes(rows, t->choice->k, t->choice->listed_ld), rows);
}

static int read_setting(b2_turns *t, b2_err *err)
{
    const char *said = getenv("BLIP2C_STEPS_AHEAD");
    char *end = NULL;
    t->always = -1;
    if (!said || !*said)
        return 0;
    t->always = strtol(said, &end, 10);
    if (*end || t->always < 0 || t->always > MOST)
        return b2_fail(err, B2_E_VALUE, "BLIP2C_STEPS_AHEAD: expected a number from 0 to %d, found '%s'", (int)MOST, said);
    return 0;
}

int b2_turns_plan(b2_turns *t, b2_ctx *ctx, const b2_choice *choice, int64_t rows, int64_t suffix_ld, b2_err *err)
{
    if (!ctx->ops->choose)
        return 0;
    if (read_setting(t, err) < 0)
        return -1;
    t->choice = choice;
    t->next = FIRST;
    size_t turn = turn_bytes(t, rows), width = (size_t)(choice->history_ld + suffix_ld);
    t->log_bytes = B2_CHOICE_HEADER + turn * (size_t)b2_max64(1, b2_min64(MOST, (int64_t)(most_log / turn)));
    t->log_there = b2_memory_alloc(ctx->memory, t->log_bytes, 1, "steps ahead", err);
    t->spare = b2_memory_alloc(ctx->memory, (size_t)rows, width * sizeof *t->spare, "steps ahead", err);
    t->log_here = b2_alloc(t->log_bytes, 1, "steps ahead", err);
    t->row = b2_alloc((size_t)rows, sizeof *t->row, "steps ahead", err);
    t->map = b2_alloc((size_t)rows, sizeof *t->map, "steps ahead", err);
    return t->log_there && t->spare && t->log_here && t->row && t->map ? 0 : -1;
}

void b2_turns_release(b2_turns *t, b2_ctx *ctx)
{
    b2_memory_free(ctx->memory, t->log_there);
    b2_memory_free(ctx->memory, t->spare);
    b2_free(t->log_here);
    b2_free(t->row);
    b2_free(t->map);
}

/* Whoever waits looks at the cancel flag only afterwards. */
int64_t b2_turns_wanted(const b2_turns *t, int64_t n, int64_t room)
{
    if (!t->choice)
        return 0;
    int64_t fits = (int64_t)((t->log_bytes - B2_CHOICE_HEADER) / turn_bytes(t, n)), wanted = t->always;
    if (t->always < 0) {
        int64_t in_time = t->step_ns > 0 ? B2_POLL_INTERVAL_NS / t->step_ns : t->next;
        wanted = b2_max64(1, b2_min64(t->next, in_time));
    }
    return b2_min64(wanted, b2_min64(room, fits));
}

void b2_turns_begin(b2_turns *t, int64_t n, const int32_t *row, int64_t wanted)
{
    t->began = b2_now_ns();
    t->rows = n;
    t->launched = wanted;
    t->done = t->at = 0;
    memset(t->counters, 0, sizeof t->counters);
    t->counters[B2_CHOICE_WANTED] = (uint32_t)wanted;
    for (int64_t i = 0; t->choice && i < n; i++) {
        t->row[i] = row[i];
        t->map[i] = (int32_t)i;
    }
}

void b2_turns_forget(b2_turns *t)
{
    t->launched = 0;
}

/* ---- the log ---- */

static b2_shortlist_parts parts_at(const b2_turns *t, int64_t turn, const int32_t **tokens, const int32_t **parents)
{
    char *at = t->log_here + B2_CHOICE_HEADER + (size_t)turn * turn_bytes(t, t->rows);
    b2_shortlist_parts parts = b2_shortlist_parts_of(at, t->rows, t->choice->k, t->choice->listed_ld);
    *tokens = parts.listed + t->rows * parts.listed_ld;
    *parents = *tokens + t->rows;
    return parts;
}

int b2_turns_have(b2_turns *t, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token)
{
    const int32_t *tokens, *parents;
    if (t->launched == 0 || t->at + 1 >= t->done)
        return 0;
    parts_at(t, t->at, &tokens, &parents);
    for (int64_t i = 0, q = 0; i < n; i++) {
        while (q < t->rows && t->row[q] < row[i])
            q++;
        if (q == t->rows || t->row[q] != row[i] || tokens[q] != token[i] || t->row[parents[q]] != parent[i])
            return 0;
        t->map[i] = (int32_t)q;
    }
    t->at++;
    return 1;
}

void b2_turns_waited(b2_turns *t, int64_t steps)
{
    if (t->choice)
        t->step_ns = (b2_now_ns() - t->began) / steps + 1;
}

int b2_turns_fetch(b2_turns *t, b2_ctx *ctx, b2_err *err)
{
    int32_t done;
    if (t->done > 0)
        return 0;
    size_t bytes = B2_CHOICE_HEADER + (size_t)t->launched * turn_bytes(t, t->rows);
    if (b2_download(ctx, t->log_here, t->log_there, bytes, err) < 0)
        return -1;
    memcpy(&done, t->log_here, sizeof done);
    if (done < 1 || done > t->launched)
        return b2_fail(err, B2_E_INTERNAL, "steps ahead: %d done of %lld", (int)done, (long long)t->launched);
    t->done = done;
    t->next = b2_min64(2 * t->next, MOST);
    b2_turns_waited(t, done);
    return 0;
}

/* Rows of `from` that the last call asked for, side by side in `to`. */
static void gather(const b2_turns *t, int64_t n, const b2_shortlist_parts *to, const b2_shortlist_parts *from)
{
    size_t k = (size_t)from->k, ld = (size_t)from->listed_ld;
    for (size_t i = 0; i < (size_t)n; i++) {
        size_t q = (size_t)t->map[i];
        to->sums[i] = from->sums[q];
        to->tops[i] = from->tops[q];
        to->crowded[i] = from->crowded[q];
        memcpy(to->values + i * k, from->values + q * k, k * sizeof *to->values);
        memcpy(to->ids + i * k, from->ids + q * k, k * sizeof *to->ids);
        memcpy(to->listed_values + i * ld, from->listed_values + q * ld, ld * sizeof *to->listed_values);
        memcpy(to->listed + i * ld, from->listed + q * ld, ld * sizeof *to->listed);
    }
}

int b2_turns_list(const b2_turns *t, int64_t n, b2_shortlist *list, void *here, b2_err *err)
{
    const int32_t *tokens, *parents;
    b2_shortlist_parts all = parts_at(t, t->at, &tokens, &parents);
    b2_shortlist_parts wanted = b2_shortlist_parts_of(here, n, all.k, all.listed_ld);
    gather(t, n, &wanted, &all);
    if (all.k != list->k || all.listed_ld != list->listed_ld ||
        memcmp(wanted.listed, list->listed, (size_t)(n * list->listed_ld) * sizeof *list->listed) != 0)
        return b2_fail(err, B2_E_INTERNAL, "steps ahead: step %lld has other listed ids than the search",
                       (long long)t->at);
    list->sums = wanted.sums;
    list->tops = wanted.tops;
    list->crowded = wanted.crowded;
    list->values = wanted.values;
    list->ids = wanted.ids;
    list->listed_values = wanted.listed_values;
    return 0;
}

int64_t b2_turns_logits(const b2_turns *t, int64_t i)
{
    if (t->launched == 0)
        return i;
    return t->at + 1 == t->done ? t->map[i] : -1;
}
