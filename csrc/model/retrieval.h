/* Texts alone, and how near pictures and texts are (BLIP-2 paper, sections 3.2 and 4.4). Pictures, alone or with a text
 * each, go through b2_blip2_encode. */
#ifndef B2_MODEL_RETRIEVAL_H
#define B2_MODEL_RETRIEVAL_H

#include "model/blip2.h"

/* What texts become; data NULL where it is not wanted. */
typedef struct b2_read {
    b2_tensor text;   /* [N, D_q]: last hidden state */
    b2_tensor embeds; /* [N, P]: text_projection, rows of length 1 */
} b2_read;

/* `count` texts -> out. Reserves the arena itself; they go through in groups that bound its size, which changes no bit. */
int b2_blip2_read_texts(b2_ctx *ctx, const b2_blip2 *model, const b2_read *out, const b2_texts *texts, int64_t count,
                        b2_err *err);

/* out [N, 2] = whether text n belongs to picture picture_of[n]: logits of no, yes (ITM). images [M*T, E] are M pictures'
 * embeddings, picture_of [N] ascends below M. Reserves the arena itself; texts go through in groups that bound its size,
 * which changes no bit. Keys and values of a picture are computed once for a group. */
int b2_blip2_match(b2_ctx *ctx, const b2_blip2 *model, b2_tensor out, b2_tensor images, int64_t pictures,
                   const b2_texts *texts, const int32_t *picture_of, b2_err *err);

/* The Q-Former alone, on what the caller gives. Reserves the arena itself. */
int b2_blip2_run_qformer(b2_ctx *ctx, const b2_blip2 *model, const b2_qformer_out *out, const b2_qformer_in *in,
                         b2_err *err);

/* out [I, J] = the largest cosine of a query of picture i with text j: images [I*Q, P], texts [J, P], rows of length 1.
 * Reserves the arena itself. */
int b2_similarity(b2_ctx *ctx, b2_tensor out, b2_tensor images, b2_tensor texts, int64_t queries, b2_err *err);

#endif
