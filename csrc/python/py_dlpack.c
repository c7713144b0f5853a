/* DLPack both ways (dmlc.github.io/dlpack 1.x, and the array API standard of 2023 on __dlpack__): somebody's array on a device
 * becomes a DeviceArray, and a DeviceArray becomes somebody's.
 *
 * In: the producer makes the device's stream of arrivals wait for its own, queues that are taken later wait for that one, and
 * nobody waits on the host. The capsule's contents are ours from then on, to be given back once nothing reads them.
 * Out: calls return when their results are there, so a consumer's stream has nothing to wait for. */
#include "python/py_array.h"

#include <string.h>

#include "core/memory.h"

/* ---- as the standard lays them out ---- */

enum { ON_HOST = 1, ON_CUDA = 2, ON_CUDA_MANAGED = 13 };
enum { CODE_INT = 0, CODE_UINT = 1, CODE_FLOAT = 2, CODE_BFLOAT = 4, CODE_BOOL = 6 };
enum { FLAG_READ_ONLY = 1, FLAG_COPIED = 2 };
enum { MAJOR = 1, MINOR = 0 };

typedef struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;   /* [ndim] */
    int64_t *strides; /* [ndim] in elements, or NULL: in order */
    uint64_t offset;  /* bytes */
} dl_tensor;

typedef struct dl_old {
    dl_tensor tensor;
    void *owner;
    void (*deleter)(struct dl_old *);
} dl_old;

typedef struct dl_versioned {
    struct {
        uint32_t major, minor;
    } version;
    void *owner;
    void (*deleter)(struct dl_versioned *);
    uint64_t flags;
    dl_tensor tensor;
} dl_versioned;

/* Of a capsule: what it holds, its names before and after it was used. */
static const char old_name[] = "dltensor", old_used[] = "used_dltensor";
static const char versioned_name[] = "dltensor_versioned", versioned_used[] = "used_dltensor_versioned";

/* ---- in ---- */

static void release_old(void *source)
{
    dl_old *managed = source;
    if (managed->deleter)
        managed->deleter(managed);
}

static void release_versioned(void *source)
{
    dl_versioned *managed = source;
    if (managed->deleter)
        managed->deleter(managed);
}

/* What a capsule gave. */
typedef struct given {
    void *source;
    b2py_release release;
    const dl_tensor *tensor;
    int read_only;
} given;

/* object.__dlpack__(stream=arrivals), of version 1 where the producer knows it. */
static PyObject *ask(PyObject *object, b2py_place place)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__"), *none = PyTuple_New(0), *capsule = NULL;
    unsigned long long stream = place.backend->arrivals(place.device);
    PyObject *options = Py_BuildValue("{s:K,s:(ii)}", "stream", stream, "max_version", MAJOR, MINOR);
    if (method && none && options) {
        capsule = PyObject_Call(method, none, options);
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* before 2023 there was no max_version */
            PyErr_Clear();
            capsule = PyDict_DelItemString(options, "max_version") == 0 ? PyObject_Call(method, none, options) : NULL;
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(options);
    return capsule;
}

/* Takes what the capsule holds out of it. */
static int open_capsule(given *g, PyObject *capsule, const char *name)
{
    if (PyCapsule_IsValid(capsule, versioned_name)) {
        dl_versioned *managed = PyCapsule_GetPointer(capsule, versioned_name);
        if (managed->version.major != MAJOR) {
            PyErr_Format(PyExc_BufferError, "%s: expected DLPack 1, found %u.%u", name, managed->version.major,
                         managed->version.minor);
            return -1;
        }
        *g = (given){managed, release_versioned, &managed->tensor, (managed->flags & FLAG_READ_ONLY) != 0};
        return PyCapsule_SetName(capsule, versioned_used);
    }
    if (PyCapsule_IsValid(capsule, old_name)) {
        dl_old *managed = PyCapsule_GetPointer(capsule, old_name);
        *g = (given){managed, release_old, &managed->tensor, 0};
        return PyCapsule_SetName(capsule, old_used);
    }
    const char *found = PyCapsule_CheckExact(capsule) ? PyCapsule_GetName(capsule) : NULL;
    PyErr_Format(PyExc_BufferError, "%s: expected a DLPack capsule that nobody has used yet, found %s", name,
                 found ? found : Py_TYPE(capsule)->tp_name);
    return -1;
}

static int fail_dtype(const dl_tensor *t, const char *name)
{
    static const char *const kinds[] = {[CODE_INT] = "int", [CODE_UINT] = "uint", [CODE_FLOAT] = "float",
                                        [CODE_BFLOAT] = "bfloat", [CODE_BOOL] = "bool"};
    const char *kind = t->dtype.code < sizeof kinds / sizeof *kinds ? kinds[t->dtype.code] : NULL;
    if (t->dtype.lanes != 1)
        PyErr_Format(PyExc_TypeError, "%s must be floats, found elements of %d numbers", name, (int)t->dtype.lanes);
    else
        PyErr_Format(PyExc_TypeError, "%s must be floats, found %s%d", name, kind ? kind : "DLPack type ",
                     kind ? (int)t->dtype.bits : (int)t->dtype.code);
    return -1;
}

static int fail_device(int type, int id, const char *name, b2py_place place)
{
    if (type == ON_CUDA)
        PyErr_Format(PyExc_ValueError, "%s: lies on cuda:%d, expected cuda:%d", name, id, place.device->index);
    else
        PyErr_Format(PyExc_ValueError, "%s: lies on a device of DLPack's type %d, expected cuda:%d", name, type,
                     place.device->index);
    return -1;
}

static int is_here(int type, int id, b2py_place place)
{
    return type == ON_CUDA_MANAGED || (type == ON_CUDA && id == place.device->index);
}

static int check_tensor(const dl_tensor *t, const char *name, b2py_place place)
{
    int is_float = t->dtype.code == CODE_FLOAT && (t->dtype.bits == 16 || t->dtype.bits == 32 || t->dtype.bits == 64);
    if (t->dtype.lanes != 1 || !(is_float || (t->dtype.code == CODE_BFLOAT && t->dtype.bits == 16)))
        return fail_dtype(t, name);
    if (!is_here(t->device.type, t->device.id, place))
        return fail_device(t->device.type, t->device.id, name, place);
    if (t->ndim < 0 || t->ndim > B2_ARRAY_AXES) {
        PyErr_Format(PyExc_ValueError, "%s: expected at most %d axes, found %d", name, B2_ARRAY_AXES, (int)t->ndim);
        return -1;
    }
    return 0;
}

/* *first, *last: the bytes that the elements of an array that is not empty reach, counted from its data. 0, or -1 where no
 * address is that far away. Strides may be negative. */
static int reach(int64_t *first, int64_t *last, const b2_device_array *a)
{
    const int64_t most = INT64_MAX / 16 / B2_ARRAY_AXES; /* elements along an axis: all axes together are below half of int64 */
    *first = 0;
    *last = a->bits / 8 - 1;
    for (int i = 0; i < a->ndim; i++) {
        int64_t steps = a->shape[i] - 1, stride = a->strides[i];
        if (steps > 0 && (stride > most / steps || stride < -(most / steps)))
            return -1;
        *(stride < 0 ? first : last) += steps * stride * (a->bits / 8);
    }
    return 0;
}

/* Whether a device may read all of it: the least that can be known of somebody's pointer. */
static int check_data(const b2_device_array *a, const char *name, b2py_place place)
{
    b2_memory *memory = place.device->memory;
    const char *data = a->data;
    int64_t first, last;
    if (reach(&first, &last, a) < 0 || !memory->holds(memory, (const void *)((uintptr_t)data + (uintptr_t)first)) ||
        !memory->holds(memory, (const void *)((uintptr_t)data + (uintptr_t)last))) {
        PyErr_Format(PyExc_BufferError, "%s: its data is not in the memory of cuda:%d", name, place.device->index);
        return -1;
    }
    if ((uintptr_t)data % (uintptr_t)(a->bits / 8) == 0)
        return 0;
    PyErr_Format(PyExc_BufferError, "%s: expected elements at multiples of %d bytes, found an address that is none", name,
                 a->bits / 8);
    return -1;
}

/* *size: elements. 0, or -1 where there are more than addresses or the data is not there. */
static int read_tensor(b2_device_array *a, npy_intp *size, const dl_tensor *t, const char *name, b2py_place place)
{
    *a = (b2_device_array){.data = (void *)((uintptr_t)t->data + (uintptr_t)t->offset), .bits = t->dtype.bits,
                           .brain = t->dtype.code == CODE_BFLOAT, .ndim = t->ndim};
    *size = 1;
    if (t->ndim > 0 && !t->shape) {
        PyErr_Format(PyExc_BufferError, "%s: DLPack's tensor has %d axes and no shape", name, (int)t->ndim);
        return -1;
    }
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] < 0 || (t->shape[i] > 0 && *size > NPY_MAX_INTP / 8 / t->shape[i])) {
            PyErr_Format(PyExc_ValueError, "%s: axis %d of DLPack's shape is %lld", name, i, (long long)t->shape[i]);
            return -1;
        }
        a->shape[i] = t->shape[i];
        a->strides[i] = t->strides ? t->strides[i] : *size;
        *size *= (npy_intp)t->shape[i];
    }
    return *size == 0 ? 0 : check_data(a, name, place);
}

/* Operations can read it where it lies. */
static int is_in_order(const b2_device_array *a, npy_intp size)
{
    int64_t stride = 1;
    if (a->bits != 32 || size == 0 || (uintptr_t)a->data % B2_OUTER_ALIGNMENT != 0)
        return 0;
    for (int i = a->ndim - 1; i >= 0; i--) {
        if (a->shape[i] != 1 && a->strides[i] != stride)
            return 0;
        stride *= a->shape[i];
    }
    return 1;
}

static int convert(b2py_state *state, b2py_place place, void *to, const b2_device_array *from)
{
    b2_err err = {0};
    b2_device_array out = *from;
    int64_t stride = 1;
    out.data = to;
    out.bits = 32;
    out.brain = 0;
    for (int i = from->ndim - 1; i >= 0; i--) {
        out.strides[i] = stride;
        stride *= from->shape[i];
    }
    if (place.backend->convert(place.device, &out, from, &err) == 0)
        return 0;
    b2py_raise(state, &err);
    return -1;
}

/* Before anything else holds it; an exception may be set, which a deleter is not to see. */
static void release_given(given *g)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    g->release(g->source);
    PyErr_Restore(type, value, trace);
}

/* Takes over what `g` holds. */
static PyObject *view_given(b2py_state *state, given *g, const char *name, b2py_place place)
{
    b2_device_array from;
    npy_intp size, shape[B2_ARRAY_AXES];
    b2py_holding *h = NULL;
    PyArrayObject *array = NULL;
    if (check_tensor(g->tensor, name, place) == 0 && read_tensor(&from, &size, g->tensor, name, place) == 0) {
        int in_order = is_in_order(&from, size);
        size_t bytes = in_order ? 0 : (size_t)size * sizeof(float);
        h = b2py_holding_new(state, place, bytes, g->source, g->release, in_order && g->read_only);
        void *data = h && !in_order ? b2py_holding_block(h) : from.data;
        for (int i = 0; i < from.ndim; i++)
            shape[i] = (npy_intp)from.shape[i];
        if (h && (in_order || convert(state, place, data, &from) == 0))
            array = b2py_array_at(h, data, from.ndim, shape);
    }
    if (h)
        b2py_holding_let_go(h); /* an array has its own reference; without one this gives the source back */
    else
        release_given(g);
    return b2py_give(state, (PyObject *)array);
}

/* A DeviceArray is the result of a call that has ended: nothing to wait for. */
static PyObject *take_own(b2py_state *state, PyObject *object, const char *name, b2py_place place)
{
    PyArrayObject *array = b2py_floats(state, object, name, -1, place);
    if (array == b2py_layout(state, object)) {
        Py_XDECREF(array);
        return Py_NewRef(object);
    }
    return b2py_give(state, (PyObject *)array);
}

PyObject *b2py_take(b2py_state *state, PyObject *object, const char *name, b2py_place place)
{
    int type, id;
    given g;
    if (b2py_layout(state, object))
        return take_own(state, object, name, place);
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!device)
        return NULL;
    int fits = PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &id);
    Py_DECREF(device);
    if (!fits) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: __dlpack_device__ gave no pair of numbers", name);
        return NULL;
    }
    if (!is_here(type, id, place)) {
        fail_device(type, id, name, place);
        return NULL;
    }
    PyObject *capsule = ask(object, place), *array = NULL;
    if (capsule && open_capsule(&g, capsule, name) == 0)
        array = view_given(state, &g, name, place);
    Py_XDECREF(capsule);
    return array;
}

/* ---- out ---- */

/* One allocation with the axes behind it. */
typedef struct exported {
    union {
        dl_old old;
        dl_versioned versioned;
    } managed;
    b2py_holding *holding;
    int64_t axes[2 * NPY_MAXDIMS];
} exported;

static void delete_exported(exported *e)
{
    b2py_holding_drop(e->holding);
    b2_free(e);
}

static void delete_old(dl_old *managed)
{
    delete_exported(managed->owner);
}

static void delete_versioned(dl_versioned *managed)
{
    delete_exported(managed->owner);
}

/* Of a capsule that nobody has used. */
static void drop_capsule(PyObject *capsule)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (PyCapsule_IsValid(capsule, old_name))
        release_old(PyCapsule_GetPointer(capsule, old_name));
    else if (PyCapsule_IsValid(capsule, versioned_name))
        release_versioned(PyCapsule_GetPointer(capsule, versioned_name));
    PyErr_Restore(type, value, trace);
}

static void fill_tensor(dl_tensor *t, int64_t *axes, PyArrayObject *array)
{
    int ndim = PyArray_NDIM(array);
    *t = (dl_tensor){.data = PyArray_DATA(array), .ndim = ndim, .shape = axes, .strides = axes + ndim};
    t->device.type = ON_CUDA;
    t->device.id = b2py_place_of(array).device->index;
    t->dtype.code = CODE_FLOAT;
    t->dtype.bits = 32;
    t->dtype.lanes = 1;
    for (int i = 0; i < ndim; i++) {
        axes[i] = PyArray_DIM(array, i);
        axes[ndim + i] = PyArray_STRIDE(array, i) / (npy_intp)sizeof(float);
    }
}

static PyObject *export_array(b2py_state *state, PyArrayObject *array, int versioned, int copied, b2_export to)
{
    b2_err err = {0};
    b2py_holding *holding = b2py_holding_of(array);
    int read_only = b2py_holding_read_only(holding);
    if (read_only && !versioned) {
        PyErr_SetString(PyExc_BufferError, "DeviceArray: it may not be written, which only DLPack 1 can say");
        return NULL;
    }
    exported *e = b2_alloc_zeroed(1, sizeof *e, "DLPack", &err);
    if (!e)
        return b2py_raise(state, &err);
    e->holding = b2py_holding_keep(holding);
    if (versioned) {
        dl_versioned *m = &e->managed.versioned;
        m->version.major = MAJOR;
        m->version.minor = MINOR;
        m->owner = e;
        m->deleter = delete_versioned;
        m->flags = (read_only ? FLAG_READ_ONLY : 0) | (copied ? FLAG_COPIED : 0);
        fill_tensor(&m->tensor, e->axes, array);
    } else {
        e->managed.old.owner = e;
        e->managed.old.deleter = delete_old;
        fill_tensor(&e->managed.old.tensor, e->axes, array);
    }
    PyObject *capsule = PyCapsule_New(&e->managed, versioned ? versioned_name : old_name, drop_capsule);
    if (capsule)
        b2py_holding_export(holding, to);
    else
        delete_exported(e);
    return capsule;
}

/* None, -1 or a stream's number: the data is there whichever it is. *to: who may use it, of which 1 and 2 are default
 * streams, that of the process and that of a thread. */
static int read_stream(b2_export *to, PyObject *stream)
{
    *to = B2_TO_DEFAULT_STREAM;
    if (stream == Py_None)
        return 0;
    if (!PyLong_Check(stream) || PyBool_Check(stream)) {
        PyErr_Format(PyExc_TypeError, "stream: expected None or a number, found %s", Py_TYPE(stream)->tp_name);
        return -1;
    }
    int overflows;
    long long number = PyLong_AsLongLongAndOverflow(stream, &overflows);
    if (overflows == 0 && (number < -1 || number == 0)) {
        PyErr_Format(PyExc_ValueError, "stream: expected -1, 1 (the default stream) or above, found %lld", number);
        return -1;
    }
    if (overflows != 0 || number < 1 || number > 2)
        *to = B2_TO_ANY_STREAM;
    return 0;
}

static int read_version(int *versioned, PyObject *version)
{
    int major, minor;
    *versioned = 0;
    if (version == Py_None)
        return 0;
    if (!PyTuple_Check(version) || !PyArg_ParseTuple(version, "ii", &major, &minor)) {
        PyErr_SetString(PyExc_TypeError, "max_version: expected None or a pair of numbers");
        return -1;
    }
    *versioned = major >= 1;
    return 0;
}

/* *to_host: whether the caller wants it there. */
static int read_dl_device(int *to_host, PyObject *device, PyArrayObject *array)
{
    int type, id, here = b2py_place_of(array).device->index;
    *to_host = 0;
    if (device == Py_None)
        return 0;
    if (!PyTuple_Check(device) || !PyArg_ParseTuple(device, "ii", &type, &id)) {
        PyErr_SetString(PyExc_TypeError, "dl_device: expected None or a pair of numbers");
        return -1;
    }
    *to_host = type == ON_HOST;
    if (*to_host || (type == ON_CUDA && id == here))
        return 0;
    PyErr_Format(PyExc_BufferError, "dl_device: expected (1, 0) or (2, %d), found (%d, %d)", here, type, id);
    return -1;
}

/* A copy on the host, as NumPy exports it. */
static PyObject *export_host(b2py_state *state, PyArrayObject *array, PyObject *version, PyObject *copy)
{
    if (copy == Py_False) {
        PyErr_SetString(PyExc_BufferError, "copy: what lies on a device comes to the host by a copy");
        return NULL;
    }
    PyObject *here = b2py_to_host(state, array), *capsule = NULL;
    PyObject *method = here ? PyObject_GetAttrString(here, "__dlpack__") : NULL, *none = PyTuple_New(0);
    PyObject *options = version == Py_None ? PyDict_New() : Py_BuildValue("{s:O}", "max_version", version);
    if (method && none && options)
        capsule = PyObject_Call(method, none, options);
    Py_XDECREF(here);
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(options);
    return capsule;
}

PyObject *b2py_dlpack(b2py_state *state, PyArrayObject *array, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    int versioned, to_host;
    b2_export to;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO", names, &stream, &version, &device, &copy) ||
        read_stream(&to, stream) < 0 || read_version(&versioned, version) < 0 ||
        read_dl_device(&to_host, device, array) < 0)
        return NULL;
    if (to_host)
        return export_host(state, array, version, copy);
    if (copy != Py_True) /* of a caller's array that has just arrived, what makes it may be under way */
        return b2py_settle(state, b2py_place_of(array)) < 0 ? NULL : export_array(state, array, versioned, 0, to);
    PyArrayObject *copied = b2py_ordered(state, array);
    PyObject *capsule = copied ? export_array(state, copied, versioned, 1, to) : NULL;
    Py_XDECREF(copied);
    return capsule;
}
