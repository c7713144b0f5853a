/* What the files of ops/cuda share. Compiled by nvcc, and as C++ for the host by the tests (tests/cuda_host), where kernels
 * run as ordinary functions.
 *
 * Operations only put work into the stream of their context; none waits, but for check_finite and download. What is in
 * backend memory and what on the host: ops.h. */
#ifndef B2_OPS_CUDA_H
#define B2_OPS_CUDA_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
#include "core/arena.h"
#include "core/cancel.h"
#include "core/error.h"
#include "core/memory.h"
#include "core/tensor.h"
#include "ops/backend.h"
#include "ops/ops.h"
}

/* kernel<<<grid, block, shared, stream>>>(arguments...); a template with several arguments stands in parentheses. Follow it
 * with b2_cuda_launched. In a kernel, B2_DYNAMIC_SHARED(float, x) makes x the block's dynamic shared memory. */
#ifdef __CUDACC__
#define B2_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define B2_DYNAMIC_SHARED(type, name)                                       \
    extern __shared__ __align__(16) unsigned char b2_dynamic_shared[];      \
    type *name = reinterpret_cast<type *>(b2_dynamic_shared)
#else
#define B2_LAUNCH(kernel, grid, block, shared, stream, ...) \
    b2_host_launch(kernel, grid, block, shared, stream, __VA_ARGS__)
#define B2_DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(cuda_host_dynamic_shared)
#endif

struct b2_cuda_indices;
struct b2_cuda_products;
struct b2_cuda_steps;
struct b2_cuda_notes;
struct b2_cuda_pace;

/* One timeline on one device: what ctx->queue points to. */
struct b2_cuda {
    b2_device *device;
    cudaStream_t stream;
    int major, minor;          /* compute capability */
    int multiprocessors;
    size_t shared_per_block;   /* bytes of shared memory a block may have when it asks for more than 48 KiB */
    int capturing;             /* 1: operations are being recorded into a graph */
    int repeating;             /* 1: and the graph repeats them until `loop` says no */
    cudaGraphConditionalHandle loop;
    int arrays_change;         /* 1: and the host arrays that they are given may differ when it is launched */
    b2_cuda_indices *indices;  /* owned: copies of host arrays (queue.cu) */
    b2_cuda_notes *notes;      /* owned: what note_finite has seen (queue.cu) */
    b2_cuda_steps *steps;      /* owned: recorded steps (step.cu) */
    b2_cuda_pace *pace;        /* owned: how far the host is ahead (pace.cu); NULL until it works */
    double work;               /* all that was put into the stream so far (pace.cu) */
    b2_cuda *next;             /* of the device's idle queues */
    int before;                /* the calling thread's device before the queue was taken */
    b2_cuda_products *products;/* owned by the products' file; NULL until it makes one */
};

static inline b2_cuda *b2_cuda_of(const b2_ctx *ctx)
{
    return (b2_cuda *)ctx->queue;
}

static inline cudaStream_t b2_cuda_stream(const b2_ctx *ctx)
{
    return b2_cuda_of(ctx)->stream;
}

/* Device copy of a small array on the host, at a multiple of 16 bytes, in the order of the stream; valid for the operations
 * of this call. NULL on failure (and for NULL, without one). In a step that is recorded the copy is made anew from the same
 * address whenever the step is repeated; there the array must not change within the step. An array that is the same as one copied lately is not copied again. */
const void *b2_cuda_index(b2_ctx *ctx, const void *host, size_t bytes, b2_err *err);

/* `count` elements of `size` bytes from ctx->activations (undone by the caller with b2_arena_mark and b2_arena_reset). */
static inline void *b2_cuda_take(b2_ctx *ctx, size_t count, size_t size, b2_err *err)
{
    return b2_arena_take(ctx->activations, count, size, err);
}

/* 0, or -1 with an error that names `what` and says what CUDA says; out of memory is B2_E_MEMORY. */
int b2_cuda_check(cudaError_t status, const char *what, b2_err *err);

/* After a launch: whether it was accepted. */
static inline int b2_cuda_launched(const char *kernel, b2_err *err)
{
    return b2_cuda_check(cudaGetLastError(), kernel, err);
}

/* Products: frees what b2_cuda.products holds; NULL is nothing. */
void b2_cuda_products_release(b2_cuda_products *products);

#endif
