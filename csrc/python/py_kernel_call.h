/* The frame around one operation on arrays, on the processor or on a device: what lies on the host is copied there and back,
 * what lies on the device is used where it is. */
#ifndef B2_PY_KERNEL_CALL_H
#define B2_PY_KERNEL_CALL_H

#include "python/py_array.h"
#include "python/py_common.h"

#include "core/memory.h"
#include "ops/backend.h"

enum { B2PY_MOVED_MOST = 16 };

typedef struct b2py_kernel_call {
    b2py_call call;
    b2_ctx ctx;
    b2_arena scratch, activations; /* activations: of a device */
    b2_err err;
    const b2_backend *backend;     /* NULL: the processor */
    b2_device *device;
    struct b2py_moved {
        void *there;  /* a block on the device, owned */
        void *back;   /* where it is to be copied to in the end; NULL: nowhere */
        size_t bytes;
    } moved[B2PY_MOVED_MOST];
    int count;
} b2py_kernel_call;

/* For b2_scratch_bytes. */
typedef struct b2py_plan {
    int64_t rows, width, keys;
    int head_dim;
} b2py_plan;

/* A device that kernels have been asked for; it stays open as long as the module. NULL on failure. The GIL is held. */
b2_device *b2py_kernel_device(b2py_state *state, int index, b2_err *err);

/* *place of "cpu" (device NULL), "cuda", "cuda:1". 0, or -1 with the exception set. */
int b2py_kernel_place(b2py_place *place, PyObject *module, const char *device);

/* Reserves scratch and releases the GIL, or returns -1 with the exception set. */
int b2py_kernel_begin(b2py_kernel_call *k, PyObject *module, b2py_place place, b2py_plan plan);
/* Copies results back where `status` is 0, takes the GIL and frees all; returns the status, with the exception set. */
int b2py_kernel_end(b2py_kernel_call *k, PyObject *module, int status);

/* Between the two: where `bytes` of host memory are for the operation. NULL on failure, with k->err set, and for NULL. */
const void *b2py_to_device(b2py_kernel_call *k, const void *data, size_t bytes);
/* The same for what the operation writes: what is there now goes in, and at the end it comes back. */
void *b2py_through_device(b2py_kernel_call *k, void *data, size_t bytes);

/* [..., cols] as [rows, cols], where it lies; an array without axes is one row of one. */
b2_tensor b2py_view_of(PyArrayObject *array);
/* For the operation to read, and to write. */
b2_tensor b2py_input(b2py_kernel_call *k, PyArrayObject *array);
b2_tensor b2py_output(b2py_kernel_call *k, PyArrayObject *array);
/* float32 [n] as a weight; NULL: an absent one. */
b2_weight b2py_vector(b2py_kernel_call *k, PyArrayObject *array);
/* *there = a matrix as the operation wants it: on a device packed anew, unless it lies there already. 0 or -1. */
int b2py_matrix(b2_weight *there, b2py_kernel_call *k, const b2_weight *w);

#endif
