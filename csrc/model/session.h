/* What a language model is asked for: logits of given tokens, generations of prompts with pictures in them, prefixes to
 * begin prompts with. Each call opens places (places.h) for as long as it runs. */
#ifndef B2_MODEL_SESSION_H
#define B2_MODEL_SESSION_H

#include "generate/generate.h"
#include "model/blip2.h"
#include "model/places.h"

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
    b2_prefix *const *prefixes;     /* [B] what stands before the row (entries may be NULL), or NULL */
} b2_rows_in;

/* Logits of every token (of an encoder-decoder: of every decoder token): logits [N, V]. Taps: the language model's. */
int b2_session_forward(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, b2_tensor logits, b2_err *err);

typedef struct b2_session_stats {
    int64_t kv_bytes;         /* KV cache in use at the most */
    int64_t step_allocations; /* heap allocations in the steps and between them */
    b2_search_stats search;
} b2_session_stats;

/* What a generation is asked for beside its rows. */
typedef struct b2_session_request {
    const int32_t *rule_ids; /* [N] ids that the rules see, with in's offsets (the decoder's, of an encoder-decoder);
                              * those of the prefixes are put in front */
    const uint64_t *keys;    /* [B] of the draws, or NULL: the numbers of the rows */
    b2_prefix ***kept;       /* NULL, or where to put an array [B * num_return_sequences]: what each result has read and
                              * said, but for its last token, to go on from. The caller sets it to NULL, and releases
                              * the array and what is in it, errors or not */
} b2_session_request;

int b2_session_generate(b2_ctx *ctx, const b2_blip2 *model, const b2_rows_in *in, const b2_session_request *request,
                        const b2_generate_opts *opts, b2_generated *out, b2_session_stats *stats, b2_err *err);

/* How much a stream has to be ready for. */
typedef struct b2_stream_size {
    int64_t places;          /* items that run together */
    int64_t longest;         /* tokens of the longest prompt, its prefix included; of an encoder-decoder: of its ids */
    int64_t longest_decoder; /* of the longest decoder_ids; 0 without an encoder */
    int masked;              /* prompts may have masks */
} b2_stream_size;

/* Items that come one by one; item.prompt is a b2_prompt and item.ids are its timeline as the rules see it. */
int b2_session_stream(b2_ctx *ctx, const b2_blip2 *model, const b2_stream_size *size, b2_source *source, b2_sink *sink,
                      const b2_generate_opts *opts, b2_session_stats *stats, b2_err *err);

/* A prefix: what prompt->prefix holds, and prompt->ids behind it. rule_ids [prompt->length]. */
int b2_session_prefix(b2_prefix **prefix, b2_ctx *ctx, const b2_blip2 *model, const b2_prompt *prompt,
                      const int32_t *rule_ids, b2_err *err);

#endif
