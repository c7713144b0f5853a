/* What backend.cu, device.cu, queue.cu and step.cu know of each other. */
#ifndef B2_OPS_CUDA_DEVICE_H
#define B2_OPS_CUDA_DEVICE_H

#include <pthread.h>

#include "ops/cuda/cuda.h"

extern const b2_ops b2_cuda_table; /* backend.cu */

/* The calling thread's device, for as long as this object lives. */
class b2_cuda_device_guard {
    int before = -1;

public:
    cudaError_t status;
    explicit b2_cuda_device_guard(int index)
    {
        status = cudaGetDevice(&before);
        if (status == cudaSuccess && before != index)
            status = cudaSetDevice(index);
    }
    ~b2_cuda_device_guard()
    {
        if (before >= 0)
            cudaSetDevice(before);
    }
    b2_cuda_device_guard(const b2_cuda_device_guard &) = delete;
    b2_cuda_device_guard &operator=(const b2_cuda_device_guard &) = delete;
};

struct b2_cuda_block;

enum { B2_CUDA_STAGES = 2 };

/* An opened device. Blocks that are freed are kept for the next that asks (device.cu). */
struct b2_cuda_device {
    b2_device base;       /* first */
    b2_memory memory;
    pthread_mutex_t lock; /* of all that follows */
    b2_cuda_block *live, *idle; /* lists, owned */
    size_t idle_bytes;
    b2_cuda *queues;      /* idle ones, a list, owned */
    cudaStream_t copies;  /* of upload, download and arrivals */
    cudaEvent_t arrived;  /* of the last queue that was taken: where `copies` was then */
    int closed;           /* 1: no block is kept any more; 2: only blocks that are lent are left, and the last to come back
                           * takes the device along */
    void *stage[B2_CUDA_STAGES];        /* pinned, of b2_cuda_stage_bytes each; NULL before the first upload */
    cudaEvent_t staged[B2_CUDA_STAGES]; /* when the stage may be written again */
    int stage_now;        /* the one to write to next */
};

static inline b2_cuda_device *b2_cuda_device_of(const b2_cuda *queue)
{
    return (b2_cuda_device *)queue->device;
}

/* queue.cu */
void *b2_cuda_queue_take(b2_device *device, b2_err *err);
void b2_cuda_queue_give(void *queue);
void b2_cuda_queues_destroy(b2_cuda_device *device);

/* device.cu */
b2_device *b2_cuda_device_open(int index, b2_err *err);
void b2_cuda_device_close(b2_device *device);
/* What is put into the stream from now on begins when uploads and arrivals that are under way are done. The device's lock is
 * held. */
int b2_cuda_after_arrivals(b2_cuda_device *device, cudaStream_t stream, b2_err *err);

/* Pinned memory of the host, for cudaFreeHost. 0 or -1. */
int b2_cuda_pinned(void **data, size_t bytes, b2_err *err);

/* Of b2_backend. */
uint64_t b2_cuda_arrivals(b2_device *device);
int b2_cuda_settle(b2_device *device, b2_err *err);
void *b2_cuda_lend(b2_device *device, size_t bytes, b2_err *err);
void b2_cuda_give_back(b2_device *device, void *block, b2_export exported);
/* arrays.cu */
int b2_cuda_convert(b2_device *device, const b2_device_array *to, const b2_device_array *from, b2_err *err);

/* pace.cu */
void b2_cuda_pace_release(b2_cuda *queue);
/* Before work that has nothing to do with what was counted so far. */
void b2_cuda_pace_restart(b2_cuda *queue);

/* step.cu: the recorded steps of a queue. */
void b2_cuda_steps_release(b2_cuda *queue);

#endif
