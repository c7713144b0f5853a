/* Draws: counter-based, so that what a row draws depends on its own names alone and never on who else runs.
 *
 * The random numbers are Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a block of
 * four 32-bit words is a function of (seed, item key, row of the item, step, token / 4). A token is drawn from
 * softmax(scores) as the largest of scores[i] + g_i, with g_i = -log(-log(u_i)); the k largest are k draws without
 * replacement, in the order of drawing (torch.multinomial does the same race in another form). Owns nothing. */
#ifndef B2_GENERATE_DRAW_H
#define B2_GENERATE_DRAW_H

#include <stdint.h>

typedef struct b2_draws {
    uint32_t key[2];
    uint32_t step;
} b2_draws;

b2_draws b2_draws_of(uint64_t seed, uint64_t item, uint32_t row, int64_t step);

/* A token drawn from softmax(scores [n]); scores are not NaN and not all -inf. */
int64_t b2_draws_one(const b2_draws *draws, const float *scores, int64_t n);

/* races [n] = scores[i] + g_i, -inf where scores[i] is. */
void b2_draws_race(const b2_draws *draws, float *races, const float *scores, int64_t n);

#endif
