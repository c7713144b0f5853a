/* What greedy.c and beam.c share: one checked call. Private to csrc/generate. */
#ifndef B2_GENERATE_SEARCH_H
#define B2_GENERATE_SEARCH_H

#include <stdint.h>

#include "generate/generate.h"
#include "generate/rules.h"

/* One call of b2_generate after its checks. Owns `limits`. */
typedef struct b2_search {
    const b2_prompts *prompts;
    const b2_generate_opts *opts;
    b2_step *step;
    b2_pool *pool;
    b2_cancel *cancel;
    b2_generated *out; /* ids has room for [rows, width] */
    int64_t *limits;   /* [B] new tokens that each row may get */
    int64_t width;     /* the largest of them */
    int64_t longest;   /* longest prompt */
} b2_search;

/* fn on every tile by the pool, or right here where the tiles together touch too few scores to be worth waking anyone. */
int b2_search_run(const b2_search *search, int64_t tiles, int64_t scores_per_tile, b2_tile_fn fn, void *argument,
                  b2_err *err);

int b2_search_greedy(b2_search *search, b2_err *err);
int b2_search_beams(b2_search *search, b2_err *err);

static inline b2_history b2_search_history(const b2_search *search, int64_t item, const int32_t *made, int64_t length)
{
    const b2_prompts *prompts = search->prompts;
    return (b2_history){
        .prompt = prompts->ids + prompts->offsets[item],
        .prompt_length = prompts->offsets[item + 1] - prompts->offsets[item],
        .skip = prompts->skip ? prompts->skip[item] : 0,
        .made = made,
        .made_length = length,
    };
}

#endif
