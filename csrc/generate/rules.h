/* All that transformers' generate() does to a row of scores (logits in greedy search and sampling, log-probabilities
 * in beam search) between the model and the choice of a token: GenerationMixin._get_logits_processor, in its order.
 * Pure functions of one row; owns nothing.
 *
 * rules.c holds the deterministic rules and the order, warpers.c what exists for sampling only. */
#ifndef B2_GENERATE_RULES_H
#define B2_GENERATE_RULES_H

#include <stdint.h>

#include "generate/generate.h"

/* The order. Python callables stand at B2_RULE_PREFIX (prefix_allowed_tokens_fn) and B2_RULE_CUSTOM
 * (logits_processor), where C does nothing: the eager path applies the ranges between them. */
typedef enum b2_rule {
    B2_RULE_SEQUENCE_BIAS = 0,
    B2_RULE_REPETITION,
    B2_RULE_NGRAMS,
    B2_RULE_BAD_WORDS,
    B2_RULE_MIN_LENGTH,
    B2_RULE_MIN_NEW_TOKENS,
    B2_RULE_PREFIX,
    B2_RULE_FORCED_BOS,
    B2_RULE_FORCED_EOS,
    B2_RULE_REMOVE_INVALID,
    B2_RULE_DECAY,
    B2_RULE_SUPPRESS,
    B2_RULE_BEGIN_SUPPRESS,
    B2_RULE_CUSTOM,
    B2_RULE_TEMPERATURE,
    B2_RULE_TOP_H,
    B2_RULE_TOP_K,
    B2_RULE_TOP_P,
    B2_RULE_MIN_P,
    B2_RULE_TYPICAL,
    B2_RULE_EPSILON,
    B2_RULE_ETA,
    B2_RULE_RENORMALIZE,
    B2_RULES
} b2_rule;

/* What a row has said so far: its prompt, then its new tokens. */
typedef struct b2_history {
    const int32_t *prompt; /* [prompt_length] */
    int64_t prompt_length;
    int64_t skip;          /* leading prompt ids that the repetition penalty does not see */
    const int32_t *made;   /* [made_length] */
    int64_t made_length;
} b2_history;

/* Bytes of scratch that one call needs for a history of at most `longest` ids; a multiple of 64. */
int64_t b2_rules_scratch(const b2_generate_opts *opts, int64_t vocabulary, int64_t longest);

/* scores [V] in place, every rule; scratch: b2_rules_scratch bytes, aligned to 64. Scores must not be NaN or +Inf
 * unless opts->remove_invalid_values. */
void b2_rules_apply(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                    void *scratch);

/* The rules from `first` to before `end`. */
void b2_rules_apply_range(float *scores, int64_t vocabulary, const b2_history *history, const b2_generate_opts *opts,
                          b2_rule first, b2_rule end, void *scratch);

/* B2_E_VALUE naming the option that is out of range or names an id outside the vocabulary. */
int b2_rules_check(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err);

int b2_rules_is_eos(const b2_generate_opts *opts, int32_t id);

/* The new tokens that the limits allow behind a prompt of that length. */
int64_t b2_rules_limit(const b2_generate_opts *opts, int64_t prompt_length);

#endif
