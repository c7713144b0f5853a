/* The k largest of a row in the order in which torch.topk returns them on Linux, equal values included.
 *
 * Beam search in transformers is full of exact ties (every unborn beam and every empty slot scores -1e9), so the
 * order of equals decides which hypothesis is kept. torch.topk is not stable: it runs the C++ library's partial_sort
 * where 64 k <= n and nth_element + sort elsewhere, and the order of equals is whatever those leave. Both are
 * deterministic; topk.c performs the same comparisons and moves (those of libstdc++).
 * Values must not be NaN. Owns nothing. */
#ifndef B2_GENERATE_TOPK_H
#define B2_GENERATE_TOPK_H

#include <stdint.h>

typedef struct b2_scored {
    float value;
    int32_t index;
} b2_scored;

/* Elements of `scratch` that b2_topk needs for n values and k of them. */
int64_t b2_topk_scratch(int64_t n, int64_t k);

/* scratch[0 .. k) = the k largest of values [n] with their indices, largest first; 1 <= k <= n. */
void b2_topk(b2_scored *scratch, const float *values, int64_t n, int64_t k);

#endif
