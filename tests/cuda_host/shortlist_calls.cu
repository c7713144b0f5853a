/* b2_cuda_shortlist as the tests call it (test_cuda_shortlist.py): everything comes from the host and goes back there. */
#include <stdio.h>
#include <string.h>

#include "ops/cuda/cuda_ops.h"

extern "C" {
#include "generate/scores.h"
}

static char message[512];

/* In place of backend.cu's and queue.cu's, which would bring all operations along. */
int b2_cuda_check(cudaError_t status, const char *what, b2_err *err)
{
    return status == cudaSuccess ? 0 : b2_fail(err, B2_E_INTERNAL, "%s: %s", what, cudaGetErrorString(status));
}

int b2_cuda_upload(b2_ctx *, void *to, const void *from, size_t bytes, b2_err *err)
{
    return b2_cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "upload", err);
}

int b2_cuda_download(b2_ctx *, void *to, const void *from, size_t bytes, b2_err *err)
{
    return b2_cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "download", err);
}

/* x [rows, cols] is written back. list: its inputs; its outputs point into `here`. "" or the error. */
extern "C" __attribute__((visibility("default"))) const char *run_shortlist(b2_shortlist *list, float *x, int64_t rows,
                                                                            int64_t cols, void *here, int64_t bytes)
{
    b2_err err = {};
    b2_cuda cuda = {};
    b2_ctx ctx = {};
    void *device = NULL, *there = NULL;
    size_t x_bytes = (size_t)(rows * cols) * sizeof(float);
    ctx.queue = &cuda;
    int status = b2_cuda_check(cudaStreamCreate(&cuda.stream), "cudaStreamCreate", &err);
    if (status == 0)
        status = b2_cuda_check(cudaMalloc(&device, x_bytes), "cudaMalloc", &err);
    if (status == 0)
        status = b2_cuda_check(cudaMalloc(&there, (size_t)bytes), "cudaMalloc", &err);
    if (status == 0)
        status = b2_cuda_upload(&ctx, device, x, x_bytes, &err);
    b2_tensor logits = {(float *)device, rows, cols, cols};
    if (status == 0)
        status = b2_cuda_shortlist(&ctx, list, logits, there, here, &err);
    if (status == 0)
        status = b2_cuda_download(&ctx, x, device, x_bytes, &err);
    cudaFree(device);
    cudaFree(there);
    cudaStreamDestroy(cuda.stream);
    snprintf(message, sizeof message, "%s", status < 0 ? err.message : "");
    return message;
}

extern "C" __attribute__((visibility("default"))) double host_sum(const float *x, int64_t cols, float top)
{
    return b2_scores_sum(x, cols, top);
}
