/* The host arrays of a recorded step: where each is, and where its copies are. Between queue.cu and step.cu. */
#ifndef B2_OPS_CUDA_INDICES_H
#define B2_OPS_CUDA_INDICES_H

#include "ops/cuda/cuda.h"

enum { B2_CUDA_RECORDED = 64 };

struct b2_cuda_recording {
    char *host, *device; /* [size]: pinned, and on the device; owned by the step */
    size_t size, used;
    struct {
        const void *host;
        size_t bytes, at;
    } arrays[B2_CUDA_RECORDED];
    int count;
    int overflowed; /* there was not enough room */
    int constant;   /* the arrays never change: what they held when they were recorded is what is meant, wherever it was */
    int sent;       /* constant ones have been copied to the device */
};

/* From here on b2_cuda_index puts arrays into `recording`; NULL: into the stream, as ever. */
void b2_cuda_record_into(b2_cuda *queue, b2_cuda_recording *recording);

#endif
