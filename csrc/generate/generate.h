/* Text generation: greedy and beam search with the exact semantics of transformers 5.23 (GenerationMixin).
 *
 * The search knows nothing of models. It asks a `b2_step` for logits: `prefill` once for the prompts, then `advance`
 * for the tokens that were chosen. Running rows are numbered r = b * num_beams + beam. A row that has ended is not
 * asked for any more. All memory of a search is allocated before its first step. */
#ifndef B2_GENERATE_H
#define B2_GENERATE_H

#include <stdint.h>

#include "core/error.h"
#include "core/pool.h"

typedef struct b2_step b2_step;
struct b2_step {
    int64_t vocabulary; /* V */
    /* Logits of the last prompt token of each row of the batch: logits [B, V]. The caller owns the array. */
    int (*prefill)(b2_step *step, float *logits, b2_err *err);
    /* n running rows go on by one token: row[i] takes over the history of running row parent[i] (numbering of the
     * step before; at the first advance: any row of the same batch row, which all hold just the prompt) and appends
     * token[i]. logits [n, V] for the next token. `row` is ascending. */
    int (*advance)(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                   float *logits, b2_err *err);
};

/* What a callable is shown: every row of the batch in transformers' order, item after item, those that have ended
 * included (filled up with pad_id). In beam search the rows given to stop() are candidates, K of each item. */
typedef struct b2_view {
    int64_t rows;           /* n */
    int64_t rows_per_item;  /* row i belongs to prompt i / rows_per_item */
    int64_t length;         /* new tokens that each row has */
    const int32_t *ids;     /* [n, ld]; the prompt in front of them is not repeated here */
    int64_t ld;
} b2_view;

/* What the caller wants to do between the steps; any function may be NULL. Rows then go on together until the last has
 * ended, as in transformers, which is what its callables and recorded scores are made for. All prompts must be equally
 * long. Called on the thread that searches. */
typedef struct b2_hooks b2_hooks;
struct b2_hooks {
    int64_t vocabulary; /* V; b2_generate fills it in before the first call */
    /* Custom logits processors stand among the rules, so this one, where it is set, takes the place of b2_rules_apply:
     * scores [n, V] in place, log-probabilities in beam search. It applies ranges of rules itself (rules.h). */
    int (*process)(b2_hooks *hooks, const b2_view *view, float *scores, b2_err *err);
    /* Custom stopping criteria, after the tokens of a step were appended: sets ends[i] = 1 for rows that are to end. */
    int (*stop)(b2_hooks *hooks, const b2_view *view, uint8_t *ends, b2_err *err);
    /* A streamer: the tokens [n] of this step (one row per item; not called in beam search). */
    int (*put)(b2_hooks *hooks, int64_t n, const int32_t *tokens, b2_err *err);
    /* output_logits: what the model said [n, V], before anything else; output_scores: what the processors and warpers
     * made of it [n, V] (of log-probabilities in beam search, without the sums of the beams). */
    int (*logits)(b2_hooks *hooks, int64_t n, const float *logits, b2_err *err);
    int (*scores)(b2_hooks *hooks, int64_t n, const float *scores, b2_err *err);
};

typedef enum b2_early_stopping {
    B2_EARLY_STOPPING_FALSE = 0,
    B2_EARLY_STOPPING_TRUE,
    B2_EARLY_STOPPING_NEVER
} b2_early_stopping;

/* transformers' names. Python has resolved the defaults and which of two options wins; here everything is explicit,
 * and every bound that is set holds. Lengths count from each row's own prompt. */
typedef struct b2_generate_opts {
    int64_t max_length;             /* prompt included; < 0: unset */
    int64_t max_new_tokens;         /* < 0: unset; one of the two must be set, of both the smaller holds */
    int64_t min_length;             /* 0: off; prompt included */
    int64_t min_new_tokens;         /* < 0: unset */
    int num_beams;                  /* 1: greedy or sampling */
    int num_return_sequences;       /* at most num_beams, except when sampling without beams */
    int do_sample;                  /* draws: from softmax(scores); in beam search candidates without replacement */
    uint64_t seed;                  /* a row's draws depend on it, on the item's key, the row within the item and the step */
    double length_penalty;          /* the power is taken in double, as Python does, then rounded to fp32 */
    b2_early_stopping early_stopping;
    float repetition_penalty;       /* 1: off */
    int no_repeat_ngram_size;       /* 0: off */
    const int32_t *eos_ids;         /* [eos_count]; an id outside the vocabulary never ends a row */
    int64_t eos_count;
    int32_t pad_id;                 /* fills ended rows */
    const int32_t *bad_words;       /* all words one after another */
    const int64_t *bad_word_offsets;/* [bad_word_count + 1] */
    int64_t bad_word_count;
    const int32_t *suppress_ids;    /* [suppress_count] */
    int64_t suppress_count;
    b2_hooks *hooks;                /* NULL: none */

    /* Further rules; zero is off. */
    const int32_t *begin_suppress_ids; /* [begin_suppress_count] forbidden as the first new token */
    int64_t begin_suppress_count;
    const int32_t *biased;          /* all biased sequences one after another */
    const int64_t *biased_offsets;  /* [biased_count + 1] */
    const float *biases;            /* [biased_count] added to a sequence's last id once the others have been said */
    int64_t biased_count;
    const int32_t *forced_bos_ids;  /* [forced_bos_count] the second id of a row whose prompt is one id */
    int64_t forced_bos_count;
    const int32_t *forced_eos_ids;  /* [forced_eos_count] the last id that the limit allows */
    int64_t forced_eos_count;
    int remove_invalid_values;      /* NaN becomes 0, infinities the largest finite numbers */
    int decays;                     /* exponential_decay_length_penalty: end ids gain |score| (factor^n - 1), */
    int64_t decay_start;            /*   n = new tokens - start, once that is above 0 */
    double decay_factor;
    int renormalize_logits;         /* log_softmax after all */

    /* Warpers: between the rules and renormalize_logits, only with do_sample. */
    double temperature;             /* > 0; 1: off */
    double top_h;                   /* (0, 1]; 0: off */
    int64_t top_k;                  /* 0: off */
    double top_p;                   /* [0, 1]; 1: off */
    double min_p;                   /* [0, 1]; 0: off */
    double typical_p;               /* (0, 1]; 1: off */
    double epsilon_cutoff;          /* (0, 1); 0: off */
    double eta_cutoff;              /* (0, 1); 0: off */
} b2_generate_opts;

/* Prompts as the rules see them (repetition penalty, n-grams, lengths): packed ids; an id < 0 stands for an image
 * feature without a token and is ignored by every rule except that it counts for lengths. */
typedef struct b2_prompts {
    int64_t rows;           /* B */
    const int32_t *ids;     /* [offsets[B]] */
    const int64_t *offsets; /* [B + 1] */
    const int64_t *skip;    /* [B] or NULL: leading ids (masked pads) that the repetition penalty does not see */
} b2_prompts;

/* Owned by the caller, freed with b2_generated_release. Row o = b * num_return_sequences + j. */
typedef struct b2_generated {
    int64_t rows;       /* B * num_return_sequences */
    int64_t max_new;    /* width of `ids`: as many columns as the longest row needed */
    int32_t *ids;       /* [rows, max_new] new tokens only (eos included), filled up with pad_id */
    int64_t *lengths;   /* [rows] tokens before the filling */
    float *scores;      /* [rows] sequences_scores of beam search; 0 without beams */
    int32_t *beam_rows; /* [rows, max_new] transformers' beam_indices: the running row (item * num_beams + beam) that each
                         * token was appended to; -1 behind the end; NULL without beams */
    int64_t steps;      /* model calls after the prefill */
} b2_generated;

/* B2_E_VALUE naming the option or the prompt. For callers who allocate by the options before they search. */
int b2_generate_check(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t vocabulary, b2_err *err);

/* b2_generate_check, then the search. */
int b2_generate(b2_generated *out, const b2_prompts *prompts, const b2_generate_opts *opts, b2_step *step,
                b2_pool *pool, b2_cancel *cancel, b2_err *err);
void b2_generated_release(b2_generated *out);

#endif
