/* The logits rules of transformers' generate(), applied to one row of scores (logits in greedy search,
 * log-probabilities in beam search) in its order: repetition penalty, repeated n-grams, bad words, minimum length,
 * suppressed tokens. Only the first changes a finite value; the others forbid tokens (-inf). Owns nothing. */
#ifndef B2_GENERATE_RULES_H
#define B2_GENERATE_RULES_H

#include <stdint.h>

#include "generate/generate.h"

/* What a row has said so far: its prompt, then its new tokens. */
typedef struct b2_history {
    const int32_t *prompt; /* [prompt_length] */
    int64_t prompt_length;
    int64_t skip;          /* leading prompt ids that the repetition penalty does not see */
    const int32_t *made;   /* [made_length] */
    int64_t made_length;
} b2_history;

/* scores [V] in place; scratch [prompt_length + made_length]. */
void b2_rules_apply(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                    float *scratch);

int b2_rules_is_eos(const b2_generate_opts *opts, int32_t id);

#endif
