/* Text generation: greedy and beam search with the exact semantics of transformers 5.23 (GenerationMixin), sampling with
 * its distributions.
 *
 * Items (a prompt each) come from a `b2_source`, take one of P places, and leave through a `b2_sink` as soon as they are
 * finished; the next one enters where one has left. Every item counts its own steps and gets what it would get alone.
 * The search knows nothing of models. It asks a `b2_step` for logits: `prefill` for the items that enter, then `advance`
 * for the tokens that were chosen, all running rows together though their lengths differ. Running rows are numbered
 * r = place * W + j, where W is num_beams, or num_return_sequences when sampling without beams. A row that has ended is
 * not asked for any more (with hooks: see there). All memory of a search is allocated before its first step. */
#ifndef B2_GENERATE_H
#define B2_GENERATE_H

#include <stdint.h>

#include "core/error.h"
#include "core/pool.h"
#include "ops/ops.h"

/* One prompt. What it points to stays valid until the sink has had the item. */
typedef struct b2_item {
    int64_t index;       /* how source and sink know it */
    const int32_t *ids;  /* [length] as the rules see them (repetition penalty, n-grams, lengths); an id < 0 stands for an
                          * image feature without a token and is ignored by every rule except that it counts for lengths */
    int64_t length;
    int64_t skip;        /* leading ids (masked pads) that the repetition penalty does not see */
    uint64_t key;        /* names its draws: the same seed and key draw the same, whoever else is in the batch */
    const void *prompt;  /* what the step reads; the search does not look at it */
} b2_item;

typedef enum b2_sourced { B2_SOURCE_END = 0, B2_SOURCE_ITEM, B2_SOURCE_LAST, B2_SOURCE_LATER } b2_sourced;

/* Where items come from. Asked whenever there is a free place, before each step. */
typedef struct b2_source b2_source;
struct b2_source {
    /* *found = B2_SOURCE_ITEM: *item is filled in. B2_SOURCE_LAST: likewise, and it is known that it is the last one; not asked
     * again. B2_SOURCE_LATER: none yet, ask again; never where `wait` is 1, which is
     * when nothing runs: the source then waits. B2_SOURCE_END: none any more; not asked again. */
    int (*next)(b2_source *source, b2_item *item, int wait, b2_sourced *found, b2_err *err);
};

/* A finished item; the pointers are valid during the call. */
typedef struct b2_finished {
    int64_t index;
    int32_t place;          /* it is still there */
    int64_t rows;           /* num_return_sequences, best first */
    const int32_t *ids;     /* [rows, ld] new tokens only (eos included) */
    int64_t ld;
    const int64_t *lengths; /* [rows] */
    const float *scores;    /* [rows] sequences_scores of beam search; 0 without beams */
    const int32_t *beams;   /* [rows, ld] the beam (0 .. num_beams-1) that each token was appended to; NULL without beams */
} b2_finished;

typedef struct b2_sink b2_sink;
struct b2_sink {
    int (*take)(b2_sink *sink, const b2_finished *finished, b2_err *err);
};

typedef struct b2_step b2_step;
struct b2_step {
    int64_t vocabulary; /* V */
    int alone;          /* the search sets it before advance() */
    /* n items enter at free places [n], ascending. logits [n, V] of the last token of each prompt. */
    int (*prefill)(b2_step *step, int64_t n, const int32_t *places, const b2_item *items, float *logits, b2_err *err);
    /* n running rows go on by one token: row[i] takes over the history of running row parent[i] (of the same place; at an
     * item's first advance all its rows hold just the prompt) and appends token[i]. logits [n, V] for the next token.
     * `row` is ascending. Rows of one place that go on have the same number of tokens. */
    int (*advance)(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                   float *logits, b2_err *err);
    /* The item at this place is gone. */
    void (*leave)(b2_step *step, int32_t place);
    /* For steps whose logits are made in the memory of a device; else NULL, all three. plan: shortlists of up to `rows` rows
     * are going to be asked for as `choice` says, which is valid to the end of the search; called before the first step. From then
     * on `logits` above may be NULL: they stay where they are, and logits that are not numbers are an error. shortlist (ops.h):
     * of the n rows of the last call. logits: row `row` of it, to the host.
     * advance() may then compute further steps ahead where `alone` is 1: all that changes in `choice` is true of its rows, and
     * nobody is going to enter. Which of these steps are wanted the next calls say. */
    int (*plan)(b2_step *step, int64_t rows, const b2_choice *choice, b2_err *err);
    int (*shortlist)(b2_step *step, int64_t n, b2_shortlist *list, b2_err *err);
    int (*logits)(b2_step *step, int64_t row, float *logits, b2_err *err);
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

/* How much a search has to be ready for. */
typedef struct b2_search_size {
    int64_t places;  /* P: items that run together */
    int64_t longest; /* ids of the longest prompt that may come */
    int64_t width;   /* the most new tokens that an item may get */
} b2_search_size;

/* How full the batch was: items_advanced / (steps * places). */
typedef struct b2_search_stats {
    int64_t steps;          /* calls of advance */
    int64_t items;          /* that entered */
    int64_t items_advanced; /* items that went on, summed over the steps */
    int64_t rows_advanced;  /* rows likewise */
} b2_search_stats;

/* Prompts that are all there: packed ids. */
typedef struct b2_prompts {
    int64_t rows;               /* B */
    const int32_t *ids;         /* [offsets[B]] as in b2_item */
    const int64_t *offsets;     /* [B + 1] */
    const int64_t *skip;        /* [B] or NULL */
    const uint64_t *keys;       /* [B] or NULL: the numbers of the rows */
    const void *const *prompts; /* [B] or NULL: b2_item.prompt */
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
    b2_search_stats stats;
} b2_generated;

/* W. */
int64_t b2_generate_rows_per_item(const b2_generate_opts *opts);
/* What b2_generate has to be ready for with these prompts, with as many places as keep the rows of a step at most
 * `rows_at_once` (but one item at least); 0, or with hooks: a place for each. */
b2_search_size b2_generate_size(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t rows_at_once);

/* B2_E_VALUE naming the option or the prompt. For callers who allocate by the options before they search. */
int b2_generate_check_options(const b2_generate_opts *opts, int64_t vocabulary, b2_err *err);
int b2_generate_check(const b2_prompts *prompts, const b2_generate_opts *opts, int64_t vocabulary, b2_err *err);

/* b2_generate_check, then the search over all prompts. `also`, if not NULL, has every finished item too. */
int b2_generate(b2_generated *out, const b2_prompts *prompts, const b2_search_size *size, const b2_generate_opts *opts,
                b2_step *step, b2_sink *also, b2_pool *pool, b2_cancel *cancel, b2_err *err);
void b2_generated_release(b2_generated *out);

/* The search over whatever the source brings, until it ends. Hooks are refused: what they are shown needs all rows to
 * begin together. */
int b2_generate_stream(b2_search_stats *stats, const b2_search_size *size, b2_source *source, b2_sink *sink,
                       const b2_generate_opts *opts, b2_step *step, b2_pool *pool, b2_cancel *cancel, b2_err *err);

#endif
