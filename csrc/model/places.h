/* The places of a running batch: for each the cache region and the tables that say which keys its rows read. It is the
 * b2_step that a search asks for logits.
 *
 * Prompts come and go; one that enters a place is read (prefilled) into the place's region, its prefix copied there before
 * it. All rows that run advance in one call of the model, whatever their lengths. Everything is allocated when the places
 * are opened. Belongs to one thread at a time; reads an immutable b2_blip2. */
#ifndef B2_MODEL_PLACES_H
#define B2_MODEL_PLACES_H

#include "generate/generate.h"
#include "model/blip2.h"
#include "model/prefix.h"
#include "model/turns.h"

/* One prompt. The timeline (what rules, lengths and results count) is prefix and ids; of an encoder-decoder it is
 * decoder_ids, and ids go to the encoder. */
typedef struct b2_prompt {
    const int32_t *ids;         /* [length] -1: the next image feature */
    const uint8_t *mask;        /* [length], 0: a pad that nobody sees; NULL: none */
    int64_t length;
    b2_tensor features;         /* [Q, D_lm], one row for each id of -1; data NULL: there is none */
    const b2_prefix *prefix;    /* what stands before ids, or NULL */
    const int32_t *decoder_ids; /* [decoder_length]; NULL unless the model is an encoder-decoder */
    const uint8_t *decoder_mask;/* [decoder_length] or NULL */
    int64_t decoder_length;
} b2_prompt;

typedef struct b2_places_size {
    int64_t places;         /* P */
    int64_t rows_per_place; /* W */
    int64_t longest;        /* tokens of the longest prompt on the timeline, its prefix included */
    int64_t longest_encoded;/* of the longest encoder prompt; 0 without an encoder */
    int64_t together;       /* tokens of all prompts that may enter at once, as far as known: bounds the activations */
    int64_t steps;          /* tokens that a row may append */
    int all_logits;         /* forward(): logits of every token, positions as forward() counts them */
    int masked;             /* prompts may have masks */
} b2_places_size;

typedef struct b2_seat_rows b2_seat_rows;

typedef struct b2_places {
    b2_step step; /* first: the search calls it */
    b2_ctx *ctx;
    const b2_blip2 *model;
    b2_places_size size;
    b2_kv_cache cache; /* [P * (longest + W * steps)] rows */
    b2_kv_cache cross; /* [P * longest_encoded] rows */
    b2_seat_rows *seats; /* [P] */
    int64_t group_tokens;/* tokens that are prefilled together at most */
    int64_t bytes_used;  /* of both caches, now */
    int64_t bytes_most;
    uint64_t allocations_seen; /* heap allocations so far at the end of the last call ... */
    int64_t step_allocations;  /* ... and made from there to the end of an advance, summed up */
    int32_t *slots[2];   /* [P*W, steps] suffix of each running row, before and after a step */
    /* On a device, for searches that look at shortlists: logits of the last call [P*W, V], and room for a list on either side.
     * Owned; NULL before it is planned. */
    float *logits;
    int logits_stay; /* of this call: they are made there and not handed over */
    void *list_there, *list_here;
    b2_turns turns;
    int64_t rows_now; /* of the last advance; 0 after a prefill */
    /* Of one call. */
    int32_t *ids, *positions, *cache_rows; /* [group_tokens], or [P*W] if that is more */
    int32_t *offsets;                      /* [P*W + 1] */
    int32_t *starts, *lens, *suffix_lens, *cross_starts, *cross_lens, *logit_rows; /* [P*W] */
    int32_t *suffix_slots;                 /* [P*W, steps] */
    uint8_t *mask;                         /* [P*W, longest + steps] */
    uint8_t *cross_mask;                   /* [P*W, longest_encoded] */
    void *blocks[20];                      /* everything above, owned */
    int block_count;
} b2_places;

/* Of one prompt: ids in range, not empty, with as many image places as features, decoder ids where the model
 * has a decoder, a prefix of this model. `row` names it in the message. */
int b2_prompt_check(const b2_blip2 *model, const b2_prompt *prompt, int64_t row, b2_err *err);
/* Whether it can be kept as a prefix: not by an encoder-decoder, and not with a mask. */
int b2_prompt_check_keep(const b2_prompt *prompt, int64_t row, b2_err *err);
/* Tokens on the timeline. */
int64_t b2_prompt_length(const b2_prompt *prompt);

int b2_places_open(b2_places *places, b2_ctx *ctx, const b2_blip2 *model, const b2_places_size *size, b2_err *err);
void b2_places_close(b2_places *places);

/* n prompts into places 0 .. n-1; with size.all_logits logits has a row for each of their tokens, else one per prompt; data
 * NULL: nobody wants any. */
int b2_places_prefill(b2_places *places, int64_t n, const b2_prompt *prompts, b2_tensor logits, b2_err *err);

/* What the place has read and said as a prefix: its prompt and the new tokens ids [length] of one result, of which the
 * last has no key yet and is left out. beams [length] as in b2_finished; NULL: all of them are row `row`'s. `rules` are the
 * prompt's ids as the rules see them. */
int b2_places_keep(b2_prefix **kept, b2_places *places, int32_t place, const int32_t *rules, const int32_t *ids,
                   int64_t length, const int32_t *beams, int32_t row, b2_err *err);

#endif
