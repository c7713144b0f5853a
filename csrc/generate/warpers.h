/* What narrows the choice of sampling: temperature, top_h, top_k, top_p, min_p, typical_p, epsilon and eta cutoff as
 * transformers' classes of these names define them. Each works on one row of scores [V] in place, sets what it drops to
 * -Inf and keeps at least `keep` tokens (one; in beam search one more than there are end tokens). Scores are finite or
 * -Inf. Pure functions; the caller owns `scratch`. Private to csrc/generate: see b2_rules_apply. */
#ifndef B2_GENERATE_WARPERS_H
#define B2_GENERATE_WARPERS_H

#include <stdint.h>

/* Bytes of scratch for a vocabulary of that size; a multiple of 64. */
int64_t b2_warpers_scratch(int64_t vocabulary);

void b2_warp_temperature(float *scores, int64_t vocabulary, float temperature);
void b2_warp_top_h(float *scores, int64_t vocabulary, double top_h, void *scratch);
void b2_warp_top_k(float *scores, int64_t vocabulary, int64_t top_k, void *scratch);
void b2_warp_top_p(float *scores, int64_t vocabulary, double top_p, int64_t keep, void *scratch);
void b2_warp_min_p(float *scores, int64_t vocabulary, double min_p, int64_t keep, void *scratch);
void b2_warp_typical(float *scores, int64_t vocabulary, double mass, int64_t keep, void *scratch);
void b2_warp_epsilon(float *scores, int64_t vocabulary, double epsilon, int64_t keep, void *scratch);
void b2_warp_eta(float *scores, int64_t vocabulary, double epsilon, int64_t keep, void *scratch);

#endif
