/* Steps that ran ahead of a search: a device goes through several, choosing tokens by itself (ops/choice.h), and leaves a log.
 * From it the search is given what it asks for as long as it asks for the same tokens; from where it does not, the rest of
 * the log is void. Belongs to the places of the search. */
#ifndef B2_MODEL_TURNS_H
#define B2_MODEL_TURNS_H

#include "ops/ops.h"

typedef struct b2_turns {
    const b2_choice *choice; /* the search's; NULL: nothing is planned */
    char *log_there, *log_here; /* [log_bytes] in backend memory and on the host, owned */
    size_t log_bytes;
    int32_t *spare;          /* in backend memory, owned */
    int32_t *row;            /* [P*W] running row of each packed row of the run, owned */
    int32_t *map;            /* [P*W] of each packed row of the last call, its packed row in the run, owned */
    uint32_t counters[B2_CHOICE_COUNTERS];
    int64_t rows;            /* N: packed rows of the run */
    int64_t launched;        /* steps of the run at most; 0: there is none */
    int64_t done;            /* that are in the log; 0: it has not been fetched */
    int64_t at;              /* which of them the search is at */
    int64_t next;            /* steps of the next run */
    int64_t always;          /* BLIP2C_STEPS_AHEAD; -1: as time has it */
    int64_t began, step_ns;  /* when the run was asked for; how long a step has taken lately */
} b2_turns;

/* Room for runs of up to `rows` rows, whose suffixes are up to suffix_ld. */
int b2_turns_plan(b2_turns *turns, b2_ctx *ctx, const b2_choice *choice, int64_t rows, int64_t suffix_ld, b2_err *err);
void b2_turns_release(b2_turns *turns, b2_ctx *ctx);

/* How many steps to ask for of n rows, which have room for `room`; 0: none may choose for itself. */
int64_t b2_turns_wanted(const b2_turns *turns, int64_t n, int64_t room);
/* A step of running rows row [n] begins; counters are for `wanted` of them. */
void b2_turns_begin(b2_turns *turns, int64_t n, const int32_t *row, int64_t wanted);
/* 1: the step that gives these tokens to these rows has been done; the search is there now. */
int b2_turns_have(b2_turns *turns, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token);
/* The search goes another way. */
void b2_turns_forget(b2_turns *turns);

/* Waits for the run. B2_E_NUMERIC: one of its steps, wanted or not. */
int b2_turns_fetch(b2_turns *turns, b2_ctx *ctx, b2_err *err);
/* A step without a log has been waited for. */
void b2_turns_waited(b2_turns *turns, int64_t steps);
/* As b2_make_shortlist, of the step that the search is at. here: b2_shortlist_bytes. */
int b2_turns_list(const b2_turns *turns, int64_t n, b2_shortlist *list, void *here, b2_err *err);
/* Where the logits of packed row i of the last call are; -1: later steps have written over them. */
int64_t b2_turns_logits(const b2_turns *turns, int64_t i);

#endif
