/* b2_cuda_linear as the tests call it (test_cuda_linear.py): everything comes from the host and goes back there, the device's
 * properties and the arena's size are arguments. */
#include <stdio.h>
#include <string.h>

#include "ops/cuda/cublas.h"
#include "ops/cuda/cuda_ops.h"

struct linear_call {
    float *out;                 /* [rows, out_ld], on the host; what it holds is the residual where residual_is_out */
    const float *x;             /* [rows, x_ld] */
    const void *w, *scales;
    const float *column_scales; /* [k] or NULL */
    const float *bias, *residual;
    int64_t rows, n, k, out_ld, x_ld, x_offset, w_bytes, scale_bytes, residual_ld;
    int64_t dtype, act, residual_is_out;
    int64_t arena_bytes, multiprocessors, shared_per_block;
};

static char message[512];

/* In place of backend.cu's, which would bring all operations along. */
int b2_cuda_check(cudaError_t status, const char *what, b2_err *err)
{
    return status == cudaSuccess ? 0 : b2_fail(err, B2_E_INTERNAL, "%s: %s", what, cudaGetErrorString(status));
}

/* In place of pace.cu's: nobody cancels here. */
int b2_cuda_pace_on(b2_ctx *ctx, double work, b2_err *err)
{
    (void)ctx, (void)work, (void)err;
    return 0;
}

static int copied(void **device, const void *host, size_t bytes, size_t offset, b2_err *err)
{
    *device = NULL;
    if (!host)
        return 0;
    if (b2_cuda_check(cudaMalloc(device, bytes + offset), "cudaMalloc", err) < 0 ||
        b2_cuda_check(cudaMemcpy((char *)*device + offset, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy", err) < 0)
        return -1;
    return 0;
}

static int call(const linear_call *c, b2_ctx *ctx, void *blocks[8], b2_err *err)
{
    size_t row = sizeof(float) * (size_t)c->rows, offset = sizeof(float) * (size_t)c->x_offset;
    size_t out_bytes = row * (size_t)c->out_ld;
    if (copied(&blocks[0], c->out, out_bytes, 0, err) < 0 ||
        copied(&blocks[1], c->x, row * (size_t)c->x_ld, offset, err) < 0 ||
        copied(&blocks[2], c->w, (size_t)c->w_bytes, 0, err) < 0 ||
        copied(&blocks[3], c->scales, (size_t)c->scale_bytes, 0, err) < 0 ||
        copied(&blocks[4], c->column_scales, sizeof(float) * (size_t)c->k, 0, err) < 0 ||
        copied(&blocks[5], c->bias, sizeof(float) * (size_t)c->n, 0, err) < 0 ||
        copied(&blocks[6], c->residual, row * (size_t)c->residual_ld, 0, err) < 0 ||
        b2_cuda_check(cudaMalloc(&blocks[7], (size_t)c->arena_bytes + 1), "cudaMalloc", err) < 0)
        return -1;
    b2_weight w = {}, bias = {};
    w.name = "w", w.data = blocks[2], w.n = c->n, w.k = c->k, w.dtype = (b2_dtype)c->dtype, w.layout = B2_STRIDED;
    w.scales = blocks[3], w.column_scales = (float *)blocks[4], w.group = c->dtype == B2_I4 ? 32 : b2_strided_ld(c->k);
    bias.data = blocks[5], bias.n = c->n, bias.k = 1;
    b2_tensor out = {(float *)blocks[0], c->rows, c->n, c->out_ld}, residual = {(float *)blocks[6], c->rows, c->n, c->residual_ld};
    b2_tensor x = {(float *)((char *)blocks[1] + offset), c->rows, c->k, c->x_ld};
    b2_linear_opts opts = {};
    opts.bias = &bias, opts.act = (b2_act)c->act, opts.residual = c->residual_is_out ? out : residual;
    ctx->activations->base = (char *)blocks[7], ctx->activations->size = (size_t)c->arena_bytes;
    if (b2_cuda_linear(ctx, out, x, &w, &opts, err) < 0)
        return -1;
    if (ctx->activations->used)
        return b2_fail(err, B2_E_INTERNAL, "%zu bytes of scratch were not given back", ctx->activations->used);
    return b2_cuda_check(cudaMemcpy(c->out, blocks[0], out_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy", err);
}

/* "" or the error. `peak`: bytes of scratch; `library` [512]: what b2_cublas_library says. */
extern "C" __attribute__((visibility("default"))) const char *run_linear(const linear_call *c, int64_t *peak, char *library)
{
    b2_err err = {};
    b2_cuda cuda = {};
    b2_arena activations = {};
    b2_ctx ctx = {};
    void *blocks[8] = {};
    int most = 0; /* of shared memory, on this device */
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    cuda.multiprocessors = (int)c->multiprocessors;
    cuda.shared_per_block = (size_t)(c->shared_per_block < most ? c->shared_per_block : most);
    cuda.major = 9;
    ctx.activations = &activations, ctx.queue = &cuda;
    int status = b2_cuda_check(cudaStreamCreate(&cuda.stream), "cudaStreamCreate", &err);
    if (status == 0)
        status = call(c, &ctx, blocks, &err);
    const char *name = status == 0 ? b2_cublas_library(&cuda, &err) : "";
    snprintf(library, 512, "%s", name ? name : "");
    cudaStreamSynchronize(cuda.stream);
    b2_cuda_products_release(cuda.products);
    for (int i = 0; i < 8; i++)
        cudaFree(blocks[i]);
    cudaStreamDestroy(cuda.stream);
    *peak = (int64_t)activations.peak;
    snprintf(message, sizeof message, "%s", status < 0 ? err.message : "");
    return message;
}

extern "C" __attribute__((visibility("default"))) int64_t linear_scratch(int64_t rows, int64_t width)
{
    b2_ctx ctx = {};
    return (int64_t)b2_cuda_linear_scratch(&ctx, rows, width);
}

extern "C" __attribute__((visibility("default"))) void describe_products(char *text, int64_t bytes)
{
    b2_cublas_describe(text, (size_t)bytes);
}
