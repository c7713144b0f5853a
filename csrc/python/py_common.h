/* What the files of csrc/python share: the one map from codes to exceptions, and the frame around every call that
 * releases the GIL. These are the only files that include Python.h and arrayobject.h. */
#ifndef B2_PY_COMMON_H
#define B2_PY_COMMON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL b2py_numpy_api
#ifndef B2_PY_MODULE_FILE
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "core/cancel.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/pool.h"
#include "ops/ops.h"

enum { B2PY_KERNEL_DEVICES = 16 };

/* Everything the module owns: one per module object, no globals. */
typedef struct b2py_state {
    PyObject *checkpoint_error;  /* blip2c.CheckpointError(ValueError) */
    PyObject *numeric_error;     /* blip2c.NumericError(ArithmeticError) */
    PyObject *unsupported_error; /* blip2c.UnsupportedError(NotImplementedError) */
    PyTypeObject *safetensors_type;
    PyTypeObject *model_type;
    PyTypeObject *prefix_type;
    PyTypeObject *array_type;
    b2_pool *pool;
    b2_cpu cpu;
    b2_isa isa;
    const b2_ops *ops;
    const struct b2_backend *backend; /* of CUDA, once it has been asked for (py_device.c) */
    struct b2_device *kernel_devices[B2PY_KERNEL_DEVICES]; /* opened for single kernels (py_kernel_call.c); NULL: not yet */
    struct b2py_call *calls; /* that run now and may be cancelled from other threads; guarded by the GIL */
} b2py_state;

b2py_state *b2py_state_of_module(PyObject *module);
/* From an instance of a heap type made by this module (PyType_FromModuleAndSpec). */
b2py_state *b2py_state_of_type(PyTypeObject *type);

/* Sets the Python exception for `err` and returns NULL. If an exception is already set (B2_E_CANCEL after a signal
 * handler raised, B2_E_CALLBACK) it stays. */
PyObject *b2py_raise(b2py_state *state, const b2_err *err);

/* The frame around a long computation:
 *     b2py_call call; b2_cancel *cancel = b2py_call_begin(&call);   -- GIL released from here
 *     int status = b2_something(..., cancel, &err);
 *     b2py_call_end(&call);                                          -- GIL held again
 *     if (status < 0) return b2py_raise(state, &err);
 * While it runs, the main thread looks for signals every B2_POLL_INTERVAL_NS; a handler that raises cancels. */
typedef struct b2py_call {
    b2_cancel cancel;
    PyThreadState *thread;
    unsigned long starter; /* the thread that `thread` belongs to */
    struct b2py_call *next; /* of state->calls */
} b2py_call;

b2_cancel *b2py_call_begin(b2py_call *call);
void b2py_call_end(b2py_call *call);
/* A call that b2py_cancel_calls may end; both of these hold the GIL, unlist after b2py_call_end. */
b2_cancel *b2py_call_begin_listed(b2py_call *call, b2py_state *state);
void b2py_call_unlist(b2py_state *state, const b2py_call *call);
/* Every listed call that thread `starter` is in ends with B2_E_CANCEL. The GIL is held. */
void b2py_cancel_calls(b2py_state *state, unsigned long starter);
/* Inside a call, around a Python callback made from the calling thread. */
void b2py_call_hold(b2py_call *call);
void b2py_call_resume(b2py_call *call);

/* `object` as a C-contiguous, aligned, native-order array of exactly `type` (NPY_FLOAT32 ...) and `ndim` axes (-1: any).
 * No dtype conversion: a wrong dtype is a TypeError naming `name`, what was found and what was expected; a wrong number of axes a
 * ValueError. Non-contiguous, unaligned or byte-swapped arrays are copied into order. New reference. */
PyArrayObject *b2py_array(PyObject *object, const char *name, int type, int ndim);

/* The dtype with this b2_dtype_word: 0, or -1 without an exception for another. */
int b2py_dtype_named(b2_dtype *dtype, const char *name);

/* Parts of the module, each in its own file, added by module.c. */
int b2py_add_kernels(PyObject *module);     /* py_kernels.c: functions on arrays */
int b2py_add_search(PyObject *module);      /* py_search.c: greedy and beam search over a Python step function */
int b2py_add_rules(PyObject *module);       /* py_hooks.c: the rules of generation on arrays */
int b2py_add_safetensors(PyObject *module); /* py_safetensors.c: the SafetensorsFile type, write_safetensors */
int b2py_add_model(PyObject *module);       /* py_model.c: the Model type */
int b2py_add_index(PyObject *module);       /* py_index.c: the pictures of an index against texts */
int b2py_add_prefix(PyObject *module);      /* py_generate.c: the Prefix type */

#endif
