/* The state of one search, shared by its loop (search.c) and the two ways to choose tokens (single.c, beam.c). Private to
 * csrc/generate. Everything is allocated before the first step and freed at the end. */
#ifndef B2_GENERATE_SEARCH_H
#define B2_GENERATE_SEARCH_H

#include <stdint.h>

#include "generate/generate.h"
#include "generate/rules.h"

/* One place and the item on it. */
typedef struct b2_seat {
    b2_item item;
    int64_t limit; /* new tokens that it may get */
    int64_t step;  /* new tokens that each of its running rows has */
    int now;       /* which half of `said` (and of beam.c's pairs) is current */
    int taken;     /* somebody sits here */
    int over;      /* finished; with hooks it goes on until all are */
} b2_seat;

typedef struct b2_search b2_search;
typedef struct b2_few b2_few;

/* A way to choose: what happens to scores that rules and warpers have seen. */
typedef struct b2_chooser {
    int (*reserve)(b2_search *search, b2_err *err);
    void (*release)(b2_search *search);
    void (*enter)(b2_search *search, int32_t place);
    /* What is added to the scores of packed row i before choose() compares them; NULL: nothing. May run on any thread. */
    float (*addend)(const b2_search *search, int64_t i);
    /* The score of the ended hypothesis that running row r stands for, B2_CHOICE_EMPTY where it is none; NULL: there are none. */
    float (*slot)(const b2_search *search, int64_t r);
    /* For every seat of the group: said, alive, parent, token of its rows; seat->over where it is finished. */
    int (*choose)(b2_search *search, b2_err *err);
    /* `finished` of a seat that is over: ids, beams, lengths, scores. */
    void (*give_out)(b2_search *search, int32_t place, b2_finished *finished);
} b2_chooser;

extern const b2_chooser b2_single_chooser; /* num_beams = 1: argmax or a draw */
extern const b2_chooser b2_beam_chooser;

struct b2_search {
    const b2_generate_opts *opts;
    b2_search_size size;
    b2_source *source;
    b2_sink *sink;
    b2_step *step;
    b2_pool *pool;
    b2_cancel *cancel;
    b2_search_stats stats;
    const b2_chooser *chooser;
    void *choosing;       /* the chooser's own state */
    b2_few *few;          /* few.h; NULL: whole rows of scores are looked at */
    b2_choice *choice;    /* ahead.h; NULL likewise */
    int64_t width;        /* room for new tokens in a row of `said` */
    int64_t rows_per_seat;/* W */
    int source_ended;
    b2_seat *seats;       /* [P] */
    b2_item *entering;    /* [P] */
    /* The group whose scores are being looked at: all that run, or those that have just entered. */
    int32_t *group;       /* [P] places, ascending */
    int64_t group_count;
    int64_t rows;         /* packed rows of `scores` */
    int32_t *row;         /* [P*W] running row of each packed row */
    int32_t *step_parent; /* [P*W] arguments of advance() */
    int32_t *step_token;  /* [P*W] */
    uint8_t *broken;      /* [P*W] packed: NaN or +Inf */
    float *scores;        /* [P*W, V] packed */
    int64_t stride;       /* bytes of one row's scratch */
    char *scratch;        /* [P*W, stride] packed: of the rules */
    /* By running row. */
    int32_t *said[2];     /* [P*W, width] new tokens; the second half only with beams */
    uint8_t *alive;       /* [P*W] is to be advanced */
    int32_t *parent;      /* [P*W] whose history it takes over at the next advance */
    int32_t *token;       /* [P*W] what it then says */
    /* Of one finished item. */
    int64_t *lengths;     /* [W] */
    float *final_scores;  /* [W] */
    int32_t *shown;       /* [P*W] tokens for hooks->put */
};

/* fn on every tile by the pool, or right here where the tiles together touch too few scores to be worth waking anyone. */
int b2_search_tiles(const b2_search *search, int64_t tiles, int64_t scores_per_tile, b2_tile_fn fn, b2_err *err);

/* Packed row i from logits to what choose() compares. */
void b2_search_score_row(b2_search *search, int64_t i);
/* The rules alone. */
void b2_search_rules(b2_search *search, int64_t i);

/* Runs until the source has ended and every item is finished. */
int b2_search_run(b2_search *search, b2_err *err);

/* "max_length: prompt 3 has 20 tokens already ..." */
int b2_search_too_long(int64_t index, int64_t length, const b2_generate_opts *opts, b2_err *err);
/* "row 3 at step 2: every token is forbidden ..." */
int b2_search_forbidden(int64_t index, int64_t step, b2_err *err);

static inline int32_t *b2_search_said(const b2_search *search, int64_t row)
{
    int now = search->seats[row / search->rows_per_seat].now;
    return search->said[now] + row * search->width;
}

static inline float *b2_search_scores(const b2_search *search, int64_t i)
{
    return search->scores + i * search->step->vocabulary;
}

#endif
