/* The CUDA backend: its table of operations, and the one symbol that _core looks for. */
#include <string.h>

#include "ops/cuda/cublas.h"
#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/device.h"

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t scratch_bytes(const b2_ctx *ctx, int64_t max_rows, int64_t max_width, int64_t max_keys, int max_head_dim)
{
    return larger(b2_cuda_linear_scratch(ctx, max_rows, max_width),
                  larger(b2_cuda_attention_scratch(ctx, max_rows, max_width, max_keys, max_head_dim),
                         b2_cuda_rows_scratch(ctx, max_rows, max_width)));
}

static b2_ops make_table(void)
{
    b2_ops ops = {};
    ops.name = "cuda";
    ops.linear = b2_cuda_linear;
    ops.layer_norm = b2_cuda_layer_norm;
    ops.rms_norm = b2_cuda_rms_norm;
    ops.gate = b2_cuda_gate;
    ops.rope = b2_cuda_rope;
    ops.attention = b2_cuda_attention;
    ops.attention_weights = b2_cuda_attention_weights;
    ops.embedding = b2_cuda_embedding;
    ops.patches = b2_cuda_patches;
    ops.copy_rows = b2_cuda_copy_rows;
    ops.store_rows = b2_cuda_store_rows;
    ops.add_rows = b2_cuda_add_rows;
    ops.reduce_rows = b2_cuda_reduce_rows;
    ops.unit_rows = b2_cuda_unit_rows;
    ops.top_k = b2_cuda_top_k;
    ops.log_softmax = b2_cuda_log_softmax;
    ops.shortlist = b2_cuda_shortlist;
    ops.choose = b2_cuda_choose;
    ops.check_finite = b2_cuda_check_finite;
    ops.note_finite = b2_cuda_note_finite;
    ops.picture_scores = b2_cuda_picture_scores;
    ops.upload = b2_cuda_upload;
    ops.download = b2_cuda_download;
    ops.wait = b2_cuda_wait;
    ops.finish = b2_cuda_finish;
    ops.step = b2_cuda_step;
    ops.scratch_bytes = scratch_bytes;
    return ops;
}

const b2_ops b2_cuda_table = make_table();

static int fail_driver(b2_err *err)
{
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return b2_fail(err, B2_E_UNSUPPORTED, "cuda: this machine has no NVIDIA driver");
    return b2_fail(err, B2_E_UNSUPPORTED, "cuda: the NVIDIA driver knows CUDA %d.%d, needed is %d.%d", driver / 1000,
                   driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}

int b2_cuda_check(cudaError_t status, const char *what, b2_err *err)
{
    if (status == cudaSuccess)
        return 0;
    cudaGetLastError(); /* the next call is not to see it again */
    if (status == cudaErrorMemoryAllocation)
        return b2_fail(err, B2_E_MEMORY, "%s: CUDA is out of memory", what);
    if (status == cudaErrorInsufficientDriver)
        return fail_driver(err);
    if (status == cudaErrorNoDevice)
        return b2_fail(err, B2_E_UNSUPPORTED, "cuda: %s", cudaGetErrorString(status));
    return b2_fail(err, B2_E_INTERNAL, "%s: CUDA says %s: %s", what, cudaGetErrorName(status), cudaGetErrorString(status));
}

static int count_devices(int *devices, b2_err *err)
{
    *devices = 0;
    if (b2_cuda_check(cudaGetDeviceCount(devices), "cuda", err) < 0)
        return -1;
    return *devices > 0 ? 0 : b2_fail(err, B2_E_UNSUPPORTED, "cuda: no CUDA device is there");
}

static int describe(b2_device_info *info, int index, b2_err *err)
{
    cudaDeviceProp properties;
    memset(info, 0, sizeof *info);
    b2_cuda_device_guard on(index);
    if (b2_cuda_check(on.status, "cuda", err) < 0 ||
        b2_cuda_check(cudaGetDeviceProperties(&properties, index), "cuda", err) < 0 ||
        b2_cuda_check(cudaMemGetInfo(&info->free, &info->memory), "cuda", err) < 0)
        return -1;
    memcpy(info->name, properties.name, sizeof info->name - 1); /* the last byte stays 0 */
    info->major = properties.major;
    info->minor = properties.minor;
    info->multiprocessors = properties.multiProcessorCount;
    b2_cublas_describe(info->products, sizeof info->products);
    return 0;
}

static const b2_backend backend = {B2_BACKEND_VERSION,   "cuda",               count_devices,      describe,
                                   b2_cuda_device_open,  b2_cuda_device_close, b2_cuda_queue_take, b2_cuda_queue_give,
                                   b2_cuda_arrivals,     b2_cuda_convert,      b2_cuda_settle,     b2_cuda_lend,
                                   b2_cuda_give_back};

extern "C" __attribute__((visibility("default"))) const b2_backend *b2_backend_cuda(void);

extern "C" const b2_backend *b2_backend_cuda(void)
{
    return &backend;
}
