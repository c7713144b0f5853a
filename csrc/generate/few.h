/* Choosing from few scores. Where logits lie in the memory of a device, a search asks for the best of each row and for those
 * that its rules may change (b2_step.shortlist), and computes from these what it would find among all: the same tokens, and sums of
 * beams with the same bits. Where the few do not settle the choice (equal scores, everything forbidden) the whole rows come to
 * the host after all. Private to csrc/generate; single.c and beam.c ask it before they look at the scores themselves. */
#ifndef B2_GENERATE_FEW_H
#define B2_GENERATE_FEW_H

#include "generate/search.h"
#include "generate/topk.h"

/* s->few, or leaves it NULL where the step has no shortlists or the options look at every score: hooks, draws, forced tokens,
 * renormalize_logits, remove_invalid_values, more candidates or listed ids than a shortlist has. */
int b2_few_reserve(b2_search *search, b2_err *err);
void b2_few_release(b2_search *search);

/* In place of all that is done to whole rows of scores. fresh: the step was a prefill, its rows are one per item. */
int b2_few_score(b2_search *search, int fresh, b2_err *err);

/* The token of packed row i, whose score then stands in its place of b2_search_scores; -1: the whole row is there. */
int64_t b2_few_token(const b2_search *search, int64_t i);

/* The candidates of the k-th item of the group, best first, as b2_topk finds them; NULL: the whole rows are there. */
const b2_scored *b2_few_candidates(const b2_search *search, int64_t k);

#endif
