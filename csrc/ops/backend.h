/* A backend that is a library of its own, opened when a device is asked for (blip2c/_cuda.so). It exports one symbol,
 * B2_BACKEND_SYMBOL, of type b2_backend_entry.
 *
 * Levels: a backend has devices; an opened device is shared by threads and owns memory; a queue is one timeline on a device,
 * of one thread at a time. A device outlives its queues and blocks. */
#ifndef B2_OPS_BACKEND_H
#define B2_OPS_BACKEND_H

#include "core/memory.h"
#include "ops/ops.h"

/* Changes whenever anything that crosses between _core and the library does: these structs, b2_ops, b2_ctx, b2_weight. */
enum { B2_BACKEND_VERSION = 6 };

#define B2_BACKEND_SYMBOL "b2_backend_cuda"

/* What `info` says of a device. */
typedef struct b2_device_info {
    char name[128];
    int major, minor;        /* compute capability */
    int multiprocessors;
    size_t memory, free;     /* bytes */
    char products[256];      /* the library that large products go through, or why own kernels compute them */
} b2_device_info;

/* Opened device. */
typedef struct b2_device {
    int index;
    b2_memory *memory;
    const b2_ops *ops;
} b2_device;

enum { B2_ARRAY_AXES = 8 };

/* An array of a caller as it lies on a device: element (i, j, ...) is data[i*strides[0] + j*strides[1] + ...]. */
typedef struct b2_device_array {
    void *data;
    int bits;                           /* of an element: 16, 32 or 64, a float */
    int brain;                          /* 1: of the 16 bits 8 are the exponent (bfloat16) */
    int ndim;
    int64_t shape[B2_ARRAY_AXES], strides[B2_ARRAY_AXES]; /* in elements */
} b2_device_array;

/* Who else may have put work into streams that uses a block. */
typedef enum b2_export {
    B2_NOT_EXPORTED,
    B2_TO_DEFAULT_STREAM, /* or to others that it waits for; the device may go on while that is found out */
    B2_TO_ANY_STREAM      /* which may be gone by now: the whole device is waited for */
} b2_export;

typedef struct b2_backend b2_backend;
struct b2_backend {
    uint32_t version;  /* B2_BACKEND_VERSION */
    const char *name;  /* "cuda" */
    /* Devices that can be opened; B2_E_UNSUPPORTED with the reason where there is no driver or no device. */
    int (*count)(int *devices, b2_err *err);
    int (*describe)(b2_device_info *info, int index, b2_err *err);
    /* Each caller gets a device of its own, which shares nothing with others of that index. */
    b2_device *(*open)(int index, b2_err *err);
    void (*close)(b2_device *device);
    /* A queue for ctx->queue, or NULL. Releasing it waits for its work. */
    void *(*queue)(b2_device *device, b2_err *err);
    void (*release)(void *queue);

    /* ---- arrays of callers ---- */
    /* The device's stream of arrivals, as a number. Whoever hands over an array lets this stream wait for what makes it; a
     * queue that is taken afterwards begins when the stream is done. */
    uint64_t (*arrivals)(b2_device *device);
    /* In the stream of arrivals: to = from, both on this device, of one shape; to is float32, from is rounded to it. */
    int (*convert)(b2_device *device, const b2_device_array *to, const b2_device_array *from, b2_err *err);
    /* Waits for the stream of arrivals. */
    int (*settle)(b2_device *device, b2_err *err);
    /* A block of the device's memory for a result. It may be given back after the device has been closed. */
    void *(*lend)(b2_device *device, size_t bytes, b2_err *err);
    /* The block is not used again before the work of others that uses it is done. */
    void (*give_back)(b2_device *device, void *block, b2_export exported);
};

typedef const b2_backend *(*b2_backend_entry)(void);

#endif
