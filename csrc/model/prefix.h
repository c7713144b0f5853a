/* A beginning of a prompt that the model has read: its ids and the keys and values of every layer. It is
 * immutable: any number of prompts, in any number of threads, may begin with it while its owner keeps it: one picture and
 * many questions, or a conversation, whose next question goes on from a prefix that holds the earlier ones and their
 * answers.
 *
 * Reading on from a prefix gives the bits of reading everything in one go. Prefixes hold no masked pads. */
#ifndef B2_MODEL_PREFIX_H
#define B2_MODEL_PREFIX_H

#include "model/kv_cache.h"
#include "ops/ops.h"

typedef struct b2_prefix {
    const void *model;     /* whose it is */
    int64_t length;        /* tokens */
    int64_t next_position; /* of the token behind it */
    int32_t *ids;          /* [length] as the model read them, -1: an image feature; owned */
    int32_t *rule_ids;     /* [length] as the rules see them; owned */
    b2_kv_cache cache;     /* [layers, length, width], owned */
} b2_prefix;

/* Nothing in it yet; its cache is of `like`'s layers, width and kind, and in the same memory. */
b2_prefix *b2_prefix_create(const void *model, const b2_kv_cache *like, int64_t length, b2_err *err);
/* NULL is nothing. */
void b2_prefix_release(b2_prefix *prefix);

/* The first `length` tokens of `prefix`, 1 <= length <= prefix->length, as one of its own. */
int b2_prefix_head(b2_prefix **head, b2_ctx *ctx, const b2_prefix *prefix, int64_t length, b2_err *err);

/* to[first + i] = from[rows[i]] for i in [0, n), in every layer; rows NULL: i. */
int b2_prefix_copy(b2_ctx *ctx, const b2_kv_cache *to, int64_t first, const b2_kv_cache *from, const int32_t *rows,
                   int64_t n, b2_err *err);

#endif
