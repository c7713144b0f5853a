/* Float arrays of callers, on the host or on a device.
 *
 * In C both are a PyArrayObject: of one on a device the data pointer is the device's, and NumPy knows only its shape. Such an
 * array never leaves for Python as it is: what does is a DeviceArray around it (b2py_give), which lets nobody touch the data.
 * It keeps its memory, and of the device what that needs, also when the model is gone. */
#ifndef B2_PY_ARRAY_H
#define B2_PY_ARRAY_H

#include "python/py_common.h"

#include "ops/backend.h"

/* A device that arrays may lie on; device NULL: the host alone. */
typedef struct b2py_place {
    const b2_backend *backend;
    b2_device *device;
} b2py_place;

/* Memory behind arrays, shared by them and by what was exported of it; counted, without the GIL. */
typedef struct b2py_holding b2py_holding;

/* Calls somebody's deleter. */
typedef void (*b2py_release)(void *source);

/* `bytes` of the device's memory, of a caller's array `source` none: `release(source)` is called with the last reference, once
 * nothing reads it any more. NULL with an exception; `source` is then still the caller's. */
b2py_holding *b2py_holding_new(b2py_state *state, b2py_place place, size_t bytes, void *source, b2py_release release,
                               int read_only);
b2py_holding *b2py_holding_keep(b2py_holding *holding);
void b2py_holding_drop(b2py_holding *holding);
/* The same with the GIL, where an exception may be set: somebody's deleter is not to see it. */
void b2py_holding_let_go(b2py_holding *holding);
/* The block of `bytes`. */
void *b2py_holding_block(const b2py_holding *holding);
int b2py_holding_read_only(const b2py_holding *holding);
/* Others will use the memory, on such streams. The GIL is held. */
void b2py_holding_export(b2py_holding *holding, b2_export to);

/* A float32 array of `shape` at `data`, in the memory of `holding`, to which it takes a reference of its own. */
PyArrayObject *b2py_array_at(b2py_holding *holding, void *data, int ndim, const npy_intp *shape);

/* What holds the memory of an array that lies on a device; NULL: it is on the host. */
b2py_holding *b2py_holding_of(PyArrayObject *array);
b2py_place b2py_place_of(PyArrayObject *array);
static inline int b2py_is_on_device(PyArrayObject *array)
{
    return b2py_holding_of(array) != NULL;
}

/* b2py_array for float32, which also takes a DeviceArray on the device of `place`; one on another device is a ValueError that
 * names both. What does not lie in order is put in order, there. */
PyArrayObject *b2py_floats(b2py_state *state, PyObject *object, const char *name, int ndim, b2py_place place);

/* A float32 array there (device NULL: on the host), not filled, and a view of it, its last axis the columns. */
PyObject *b2py_new_floats(b2py_state *state, b2py_place place, int ndim, const npy_intp *shape, b2_tensor *view);

/* For Python: takes over `array` and returns it, or the DeviceArray around it. NULL stays NULL. */
PyObject *b2py_give(b2py_state *state, PyObject *array);

/* A copy in order, on the device; data of `array` is untouched. */
PyArrayObject *b2py_ordered(b2py_state *state, PyArrayObject *array);
/* The same on the host. */
PyObject *b2py_to_host(b2py_state *state, PyArrayObject *array);
/* Of an array of the host, there. */
PyArrayObject *b2py_to_place(b2py_state *state, PyArrayObject *array, b2py_place place);

/* Waits until what was put into the stream of arrivals is done. 0, or -1 with an exception. */
int b2py_settle(b2py_state *state, b2py_place place);

/* The array of a DeviceArray, borrowed; NULL without an exception for anything else. */
PyArrayObject *b2py_layout(b2py_state *state, PyObject *object);

int b2py_add_arrays(PyObject *module); /* the DeviceArray type */

/* py_dlpack.c: `object`, which has __dlpack__ and lies on the device, as a DeviceArray of float32 in order: where it lies, or
 * converted on the device. Its own stream is waited for by the queues that are taken afterwards. TypeError for what holds no
 * floats, ValueError for another device, BufferError for a capsule that is none. */
PyObject *b2py_take(b2py_state *state, PyObject *object, const char *name, b2py_place place);
/* DeviceArray.__dlpack__ of `array`. */
PyObject *b2py_dlpack(b2py_state *state, PyArrayObject *array, PyObject *args, PyObject *kwargs);

#endif
