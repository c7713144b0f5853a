/* One timeline of one batch: prompts with pictures in them, their KV cache, and the steps of a generation.
 *
 * A session belongs to one thread at a time and reads an immutable b2_blip2. It owns its cache and its step buffers;
 * everything is allocated before the first step. */
#ifndef B2_MODEL_SESSION_H
#define B2_MODEL_SESSION_H

#include "generate/generate.h"
#include "model/blip2.h"

/* Packed rows. An id of -1 takes the row's next image feature. Of an encoder-decoder these are the encoder's rows; the
 * decoder's stand beside them, and it is these that rules, lengths, logits and results count. */
typedef struct b2_rows_in {
    int64_t rows;            /* B */
    const int32_t *ids;      /* [N] */
    const int64_t *offsets;  /* [B + 1] */
    const uint8_t *mask;     /* [N], 0: a pad that nobody sees; NULL: none */
    b2_tensor features;      /* [B*Q, D_lm], or B times as many embeddings as each row has places; data NULL: no id is -1 */
    const int32_t *decoder_ids;     /* [offsets of the last row]; NULL unless the model is an encoder-decoder */
    const int64_t *decoder_offsets; /* [B + 1] */
    const uint8_t *decoder_mask;    /* as mask, of the decoder's ids, or NULL */
} b2_rows_in;

/* Ids in range, every row non-empty and with exactly as many image places as it has features. */
int b2_session_check(const b2_blip2 *model, const b2_rows_in *in, b2_err *err);

/* Logits of every token (of an encoder-decoder: of every decoder token): logits [N, V]. Taps: the language model's. */
int b2_session_forward(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, b2_tensor logits, b2_err *err);

typedef struct b2_session_stats {
    int64_t kv_bytes;         /* KV cache in use at the end */
    int64_t step_allocations; /* heap allocations between the prefill and the end of the search */
} b2_session_stats;

/* Prefill, then search. `rule_ids` are the ids that the rules see, with in's offsets. */
int b2_session_generate(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, const int32_t *rule_ids,
                        const b2_generate_opts *opts, b2_generated *out, b2_session_stats *stats, b2_err *err);

#endif
