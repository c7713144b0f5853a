/* b2_cuda_attention and b2_cuda_attention_weights as the tests call them (test_cuda_attention.py): everything comes from the
 * host and goes back there, and what the launches depend on of the device is an argument. */
#include <stdio.h>
#include <string.h>

#include "ops/cuda/cuda_ops.h"

struct attention_call {
    float *out;                     /* [N, out_ld], or the weights; on the host as all that follows */
    const float *q;                 /* [.., q_ld] */
    const void *k, *v, *k_suffix, *v_suffix; /* [.., kv_ld] of `keys` */
    const int32_t *q_offsets, *prefix_starts, *prefix_lens, *suffix_slots, *suffix_lens;
    const uint8_t *key_mask;
    const float *distance_bias;
    int64_t out_floats, q_rows, k_rows, suffix_rows, out_ld, q_ld, kv_ld, rows, suffix_ld, key_mask_ld;
    int64_t causal, heads, kv_heads, head_dim, distance_limit, window, operands, keys, wants_weights;
    int64_t multiprocessors, capturing;
    float scale;
};

enum { MOST_BLOCKS = 32, ARENA_BYTES = 8 << 20 };

static struct {
    void *blocks[MOST_BLOCKS];
    int count;
} taken;

static char message[512];

/* In place of backend.cu's and queue.cu's, which would bring all operations along. */
int b2_cuda_check(cudaError_t status, const char *what, b2_err *err)
{
    return status == cudaSuccess ? 0 : b2_fail(err, B2_E_INTERNAL, "%s: %s", what, cudaGetErrorString(status));
}

static void *take(int64_t bytes, b2_err *err)
{
    void *block = NULL;
    if (b2_cuda_check(cudaMalloc(&block, (size_t)bytes), "cudaMalloc", err) < 0)
        return NULL;
    return taken.blocks[taken.count++] = block;
}

static void *on_device(const void *host, int64_t bytes, b2_err *err)
{
    void *block = host ? take(bytes, err) : NULL;
    if (!block)
        return NULL;
    return b2_cuda_check(cudaMemcpy(block, host, (size_t)bytes, cudaMemcpyHostToDevice), "cudaMemcpy", err) < 0 ? NULL : block;
}

const void *b2_cuda_index(b2_ctx *ctx, const void *host, size_t bytes, b2_err *err)
{
    (void)ctx;
    return on_device(host, (int64_t)bytes, err);
}

static b2_tensor tensor_of(const void *host, int64_t element, int64_t rows, int64_t cols, int64_t ld, b2_err *err)
{
    b2_tensor t = {(float *)on_device(host, rows * ld * element, err), rows, cols, ld};
    return t;
}

static int call(const attention_call *c, b2_ctx *ctx, b2_err *err)
{
    b2_attention_args a = {};
    int64_t width = c->heads * c->head_dim, kv_width = c->kv_heads * c->head_dim;
    int64_t bytes = c->out_floats * (int64_t)sizeof(float), key = c->keys == B2_F32 ? 4 : 2;
    float *out = (float *)on_device(c->out, bytes, err);
    a.out = {out, c->q_rows, width, c->out_ld};
    a.q = tensor_of(c->q, 4, c->q_rows, width, c->q_ld, err);
    a.k = tensor_of(c->k, key, c->k_rows, kv_width, c->kv_ld, err);
    a.v = tensor_of(c->v, key, c->k_rows, kv_width, c->kv_ld, err);
    a.k_suffix = tensor_of(c->k_suffix, key, c->suffix_rows, kv_width, c->kv_ld, err);
    a.v_suffix = tensor_of(c->v_suffix, key, c->suffix_rows, kv_width, c->kv_ld, err);
    a.rows = c->rows, a.q_offsets = c->q_offsets, a.prefix_starts = c->prefix_starts, a.prefix_lens = c->prefix_lens;
    a.suffix_slots = c->suffix_slots, a.suffix_ld = c->suffix_ld, a.suffix_lens = c->suffix_lens;
    a.key_mask = c->key_mask, a.key_mask_ld = c->key_mask_ld, a.causal = (int)c->causal, a.heads = (int)c->heads;
    a.kv_heads = (int)c->kv_heads, a.head_dim = (int)c->head_dim, a.scale = c->scale, a.distance_bias = c->distance_bias;
    a.distance_limit = c->distance_limit, a.window = c->window, a.operands = (b2_dtype)c->operands, a.keys = (b2_dtype)c->keys;
    ctx->activations->base = (char *)take(ARENA_BYTES, err);
    ctx->activations->size = ARENA_BYTES;
    if (err->code != B2_OK)
        return -1;
    if ((c->wants_weights ? b2_cuda_attention_weights(ctx, out, &a, err) : b2_cuda_attention(ctx, &a, err)) < 0)
        return -1;
    if (ctx->activations->used || ctx->scratch->used)
        return b2_fail(err, B2_E_INTERNAL, "scratch was not given back");
    if (ctx->activations->peak > b2_cuda_attention_scratch(ctx, c->q_rows, width, 1, a.head_dim))
        return b2_fail(err, B2_E_INTERNAL, "more scratch than is planned");
    return b2_cuda_check(cudaMemcpy(c->out, out, (size_t)bytes, cudaMemcpyDeviceToHost), "cudaMemcpy", err);
}

/* "" or the error. `peak`: bytes of device scratch. */
extern "C" __attribute__((visibility("default"))) const char *run_attention(const attention_call *c, int64_t *peak)
{
    b2_err err = {};
    b2_cuda cuda = {};
    b2_arena activations = {}, scratch = {};
    b2_ctx ctx = {};
    cuda.multiprocessors = (int)c->multiprocessors, cuda.shared_per_block = 227 << 10, cuda.capturing = (int)c->capturing;
    ctx.activations = &activations, ctx.scratch = &scratch, ctx.queue = &cuda;
    int status = b2_arena_reserve(&scratch, 1 << 16, &err);
    if (status == 0)
        status = b2_cuda_check(cudaStreamCreate(&cuda.stream), "cudaStreamCreate", &err);
    if (status == 0)
        status = call(c, &ctx, &err);
    cudaStreamSynchronize(cuda.stream);
    while (taken.count > 0)
        cudaFree(taken.blocks[--taken.count]);
    cudaStreamDestroy(cuda.stream);
    b2_arena_release(&scratch);
    *peak = (int64_t)activations.peak;
    snprintf(message, sizeof message, "%s", status < 0 ? err.message : "");
    return message;
}
