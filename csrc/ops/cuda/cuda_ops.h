/* The operations of the CUDA backend, each as its slot in b2_ops (ops.h) says. */
#ifndef B2_OPS_CUDA_OPS_H
#define B2_OPS_CUDA_OPS_H

#include "ops/cuda/cuda.h"

/* linear.cu */
int b2_cuda_linear(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *w, const b2_linear_opts *opts, b2_err *err);
/* Bytes that b2_cuda_linear takes from ctx->activations at most. */
size_t b2_cuda_linear_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width);

/* attention.cu */
int b2_cuda_attention(b2_ctx *ctx, const b2_attention_args *args, b2_err *err);
int b2_cuda_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err);
size_t b2_cuda_attention_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim);

/* rows.cu */
int b2_cuda_layer_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, const b2_weight *beta, float eps,
                       b2_err *err);
int b2_cuda_rms_norm(b2_ctx *ctx, b2_tensor out, b2_tensor x, const b2_weight *gamma, float eps, b2_err *err);
int b2_cuda_gate(b2_ctx *ctx, b2_tensor out, b2_tensor gate, b2_tensor up, b2_act act, b2_err *err);
int b2_cuda_rope(b2_ctx *ctx, b2_tensor x, const int32_t *positions, const float *inv_freq, int rotary_dim, int head_dim,
                 float scaling, b2_err *err);
int b2_cuda_embedding(b2_ctx *ctx, b2_tensor out, const b2_weight *table, const int32_t *ids, int32_t offset,
                      int accumulate, b2_err *err);
int b2_cuda_patches(b2_ctx *ctx, b2_tensor out, b2_pictures pictures, int64_t patch, b2_err *err);
int b2_cuda_copy_rows(b2_ctx *ctx, b2_tensor out, const int32_t *out_rows, b2_tensor x, const int32_t *x_rows, int64_t n,
                      b2_err *err);
int b2_cuda_add_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err);
int b2_cuda_reduce_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_reduction reduction, b2_err *err);
int b2_cuda_unit_rows(b2_ctx *ctx, b2_tensor out, b2_tensor x, b2_err *err);
int b2_cuda_log_softmax(b2_ctx *ctx, b2_tensor x, b2_err *err);

/* keep.cu */
int b2_cuda_store_rows(b2_ctx *ctx, b2_tensor out, b2_dtype dtype, const int32_t *out_rows, b2_tensor x, b2_err *err);

/* search.cu: values and ids in backend memory. */
int b2_cuda_top_k(b2_ctx *ctx, float *values, int32_t *ids, b2_tensor x, int k, b2_err *err);
/* Waits for the stream: first_bad_row is on the host. */
int b2_cuda_check_finite(b2_ctx *ctx, int64_t *first_bad_row, b2_tensor x, b2_err *err);
int b2_cuda_picture_scores(b2_ctx *ctx, b2_tensor out, b2_tensor texts, const b2_records *records, b2_err *err);
/* shortlist.cu */
int b2_cuda_shortlist(b2_ctx *ctx, b2_shortlist *list, b2_tensor x, void *there, void *here, b2_err *err);
/* choose.cu */
int b2_cuda_choose(b2_ctx *ctx, const b2_choice *choice, const b2_choice_tables *tables, b2_tensor logits, b2_err *err);
/* Bytes that any operation of rows.cu and search.cu takes from ctx->activations at most. */
size_t b2_cuda_rows_scratch(const b2_ctx *ctx, int64_t max_rows, int64_t max_width);

/* queue.cu */
int b2_cuda_note_finite(b2_ctx *ctx, const char *stage, int layer, b2_tensor x, b2_err *err);
int b2_cuda_upload(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err);
int b2_cuda_download(b2_ctx *ctx, void *to, const void *from, size_t bytes, b2_err *err);
void b2_cuda_wait(b2_ctx *ctx);
int b2_cuda_finish(b2_ctx *ctx, b2_err *err);
/* pace.cu: `work` multiplications have been put into the stream. Now and then waits for what was put there before, and gives
 * B2_E_CANCEL where somebody wants that. */
int b2_cuda_pace_on(b2_ctx *ctx, double work, b2_err *err);
/* step.cu */
int b2_cuda_step(b2_ctx *ctx, b2_step_shape shape, b2_step_fn body, void *argument, b2_err *err);

#endif
