/* What a step of decoding needs to choose its tokens by itself, so that the next one can follow without the host.
 *
 * It is a forecast. The search (csrc/generate) later goes over the log of such steps, chooses as ever, and goes on from the
 * first step that was given other tokens than it would have given; so the choice need not be right, only nearly always, and
 * nothing is believed but shortlists of logits.
 *
 * The arrays are on the host: a b2_step_run copies them, and what a step changes in the copies the next one finds there. */
#ifndef B2_OPS_CHOICE_H
#define B2_OPS_CHOICE_H

#include <stddef.h>
#include <stdint.h>

/* One packed row. */
typedef struct b2_choice_row {
    int32_t prompt; /* ids of its prompt */
    int32_t skip;   /* of these the first that the repetition penalty does not see */
    int32_t made;   /* new tokens that it has, the one that the step reads included */
    int32_t limit;  /* and may have */
    float sum;      /* of its beam */
    int32_t over;   /* 1: it has ended */
} b2_choice_row;

typedef struct b2_choice {
    /* The shortlist of a row: `k` candidates, and as listed ids the fixed ones, then, where by_history is 1, its history; -1
     * up to listed_ld. */
    int k;
    int by_history;
    const int32_t *fixed; /* [fixed_count] */
    int64_t fixed_count;
    int64_t listed_ld;
    /* The rules as in generate/rules.h: those that a shortlist is enough for. An array is NULL where its count is 0. */
    float repetition_penalty;
    int decays;
    int64_t decay_start;
    double decay_factor;
    int64_t no_repeat_ngram_size, min_length, min_new_tokens;
    const int32_t *eos_ids;          /* [eos_count] */
    int64_t eos_count;
    const int32_t *suppress_ids;     /* [suppress_count] */
    int64_t suppress_count;
    const int32_t *bad_words;        /* [bad_word_offsets[bad_word_count]] */
    const int64_t *bad_word_offsets; /* [bad_word_count + 1] */
    int64_t bad_word_count;
    const int32_t *biased;           /* [biased_offsets[biased_count]] */
    const int64_t *biased_offsets;   /* [biased_count + 1] */
    const float *biases;             /* [biased_count] */
    int64_t biased_count;
    /* Rows of an item stand side by side and are chosen together. 1: each says its best token. */
    int beams;            /* W */
    int stops_when_full;  /* early_stopping is True */
    int stops_never;      /* it is "never" */
    double length_penalty;
    /* What changes from step to step: of N packed rows. */
    b2_choice_row *rows;  /* [N] */
    int32_t *history;     /* [N, history_ld] prompt, then new tokens */
    int64_t history_ld;
    float *slots;         /* [N] of each item, scores of its ended hypotheses; B2_CHOICE_EMPTY: none */
} b2_choice;

#define B2_CHOICE_EMPTY (-1.0e9f)

/* What the next step reads and this one writes: the tables of its operations, at the addresses that these are given. */
typedef struct b2_choice_tables {
    int32_t *ids, *positions, *cache_rows, *suffix_lens; /* [N] */
    int32_t *suffix_slots;      /* [N, suffix_ld] */
    int64_t suffix_ld;
    uint8_t *key_mask;          /* [N, key_mask_ld] or NULL */
    int64_t key_mask_ld;
    const int32_t *prefix_lens; /* [N] */
    int32_t cache_step;         /* from a row's cache row to that of its next token */
    uint32_t *turns;            /* [B2_CHOICE_COUNTERS]: zeros, but for how many steps there are to be */
    void *log;                  /* b2_choice_log_bytes, in backend memory */
    int32_t *spare;             /* [N, history_ld + suffix_ld] in backend memory */
} b2_choice_tables;

/* Where in `turns` that number stands. */
enum { B2_CHOICE_COUNTERS = 5, B2_CHOICE_WANTED = 1 };

/* The log: how many steps have been done, then of each its shortlist and what was chosen. */
enum { B2_CHOICE_HEADER = 16 };

static inline size_t b2_choice_turn_bytes(size_t shortlist_bytes, int64_t rows)
{
    return (shortlist_bytes + 2 * (size_t)rows * sizeof(int32_t) + 15) / 16 * 16;
}

#endif
