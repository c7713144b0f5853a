/* Float arrays on devices: their memory, and DeviceArray, by which Python knows them. */
#include "python/py_array.h"

#include <stdatomic.h>
#include <string.h>

#include "core/memory.h"

static const char memory_capsule[] = "blip2c.device_memory";

/* ---- memory ---- */

struct b2py_holding {
    atomic_int references;
    b2py_place place;
    void *block;          /* lent by the device, and what keeps the device: of a caller's array an empty one */
    atomic_int exported;  /* b2_export */
    int read_only;
    void *source;         /* of the caller, whose memory it is; NULL: the block is */
    b2py_release release;
};

b2py_holding *b2py_holding_new(b2py_state *state, b2py_place place, size_t bytes, void *source, b2py_release release,
                               int read_only)
{
    b2_err err = {0};
    b2py_holding *h = b2_alloc_zeroed(1, sizeof *h, "array", &err);
    if (h && (h->block = place.backend->lend(place.device, bytes, &err))) {
        atomic_init(&h->references, 1);
        h->place = place;
        h->source = source;
        h->release = release;
        h->read_only = read_only;
        return h;
    }
    b2_free(h);
    b2py_raise(state, &err);
    return NULL;
}

b2py_holding *b2py_holding_keep(b2py_holding *h)
{
    atomic_fetch_add(&h->references, 1);
    return h;
}

void b2py_holding_drop(b2py_holding *h)
{
    if (atomic_fetch_sub(&h->references, 1) != 1)
        return;
    if (h->release) {
        b2_err ignored = {0}; /* a conversion may still read it; work that has failed reads no more */
        h->place.backend->settle(h->place.device, &ignored);
        h->release(h->source);
    }
    h->place.backend->give_back(h->place.device, h->block, (b2_export)atomic_load(&h->exported));
    b2_free(h);
}

void b2py_holding_let_go(b2py_holding *h)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    b2py_holding_drop(h);
    PyErr_Restore(type, value, trace);
}

void *b2py_holding_block(const b2py_holding *h)
{
    return h->block;
}

int b2py_holding_read_only(const b2py_holding *h)
{
    return h->read_only;
}

void b2py_holding_export(b2py_holding *h, b2_export to)
{
    if ((int)to > atomic_load(&h->exported)) /* the GIL is held: nobody else stores */
        atomic_store(&h->exported, (int)to);
}

/* ---- arrays ---- */

static void drop_capsule(PyObject *capsule)
{
    b2py_holding_let_go(PyCapsule_GetPointer(capsule, memory_capsule));
}

PyArrayObject *b2py_array_at(b2py_holding *h, void *data, int ndim, const npy_intp *shape)
{
    PyArrayObject *array = (PyArrayObject *)PyArray_New(&PyArray_Type, ndim, shape, NPY_FLOAT32, NULL, data, 0,
                                                        NPY_ARRAY_CARRAY, NULL);
    PyObject *capsule = array ? PyCapsule_New(h, memory_capsule, NULL) : NULL;
    if (!capsule || PyArray_SetBaseObject(array, capsule) < 0) { /* which takes the capsule, also where it fails */
        Py_XDECREF(array);
        return NULL;
    }
    PyCapsule_SetDestructor(capsule, drop_capsule);
    b2py_holding_keep(h);
    return array;
}

b2py_holding *b2py_holding_of(PyArrayObject *array)
{
    PyObject *base = PyArray_BASE(array);
    while (base && PyArray_Check(base))
        base = PyArray_BASE((PyArrayObject *)base);
    return base && PyCapsule_IsValid(base, memory_capsule) ? PyCapsule_GetPointer(base, memory_capsule) : NULL;
}

b2py_place b2py_place_of(PyArrayObject *array)
{
    b2py_holding *h = b2py_holding_of(array);
    return h ? h->place : (b2py_place){0};
}

/* A new array on the device, not filled. */
static PyArrayObject *new_there(b2py_state *state, b2py_place place, int ndim, const npy_intp *shape)
{
    size_t bytes = sizeof(float);
    for (int i = 0; i < ndim; i++)
        bytes *= (size_t)shape[i];
    b2py_holding *h = b2py_holding_new(state, place, bytes, NULL, NULL, 0);
    PyArrayObject *array = h ? b2py_array_at(h, h->block, ndim, shape) : NULL;
    if (h)
        b2py_holding_let_go(h);
    return array;
}

static b2_device_array as_device_array(PyArrayObject *array)
{
    b2_device_array a = {.data = PyArray_DATA(array), .bits = 32, .ndim = PyArray_NDIM(array)};
    for (int i = 0; i < a.ndim; i++) {
        a.shape[i] = PyArray_DIM(array, i);
        a.strides[i] = PyArray_STRIDE(array, i) / (npy_intp)sizeof(float);
    }
    return a;
}

/* Waits without the GIL: what arrives may come from a stream that waits for a function of Python. */
static int settle(b2py_place place, b2_err *err)
{
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = place.backend->settle(place.device, err);
    Py_END_ALLOW_THREADS
    return status;
}

int b2py_settle(b2py_state *state, b2py_place place)
{
    b2_err err = {0};
    if (settle(place, &err) == 0)
        return 0;
    b2py_raise(state, &err);
    return -1;
}

PyArrayObject *b2py_ordered(b2py_state *state, PyArrayObject *array)
{
    b2py_place place = b2py_place_of(array);
    PyArrayObject *out = new_there(state, place, PyArray_NDIM(array), PyArray_DIMS(array));
    if (!out)
        return NULL;
    b2_err err = {0};
    b2_device_array to = as_device_array(out), from = as_device_array(array);
    if (place.backend->convert(place.device, &to, &from, &err) < 0 || settle(place, &err) < 0) {
        b2py_raise(state, &err);
        Py_CLEAR(out);
    }
    return out;
}

PyObject *b2py_to_host(b2py_state *state, PyArrayObject *array)
{
    b2py_place place = b2py_place_of(array);
    PyArrayObject *there = PyArray_IS_C_CONTIGUOUS(array) ? (PyArrayObject *)Py_NewRef((PyObject *)array)
                                                          : b2py_ordered(state, array);
    PyObject *here = there ? PyArray_SimpleNew(PyArray_NDIM(array), PyArray_DIMS(array), NPY_FLOAT32) : NULL;
    if (here) {
        b2_err err = {0};
        int status;
        void *to = PyArray_DATA((PyArrayObject *)here);
        size_t bytes = (size_t)PyArray_NBYTES(there);
        Py_BEGIN_ALLOW_THREADS
        status = bytes ? place.device->memory->download(place.device->memory, to, PyArray_DATA(there), bytes, &err) : 0;
        Py_END_ALLOW_THREADS
        if (status < 0) {
            b2py_raise(state, &err);
            Py_CLEAR(here);
        }
    }
    Py_XDECREF(there);
    return here;
}

PyArrayObject *b2py_to_place(b2py_state *state, PyArrayObject *array, b2py_place place)
{
    PyArrayObject *there = new_there(state, place, PyArray_NDIM(array), PyArray_DIMS(array));
    if (!there)
        return NULL;
    b2_err err = {0};
    int status;
    size_t bytes = (size_t)PyArray_NBYTES(array);
    Py_BEGIN_ALLOW_THREADS
    status = bytes ? place.device->memory->upload(place.device->memory, PyArray_DATA(there), PyArray_DATA(array), bytes, &err)
                   : 0;
    status = status == 0 ? place.backend->settle(place.device, &err) : status;
    Py_END_ALLOW_THREADS
    if (status < 0) {
        b2py_raise(state, &err);
        Py_CLEAR(there);
    }
    return there;
}

PyObject *b2py_new_floats(b2py_state *state, b2py_place place, int ndim, const npy_intp *shape, b2_tensor *view)
{
    PyObject *array = place.device ? (PyObject *)new_there(state, place, ndim, shape)
                                   : PyArray_SimpleNew(ndim, shape, NPY_FLOAT32);
    if (array)
        *view = b2_tensor_of(PyArray_DATA((PyArrayObject *)array), PyArray_MultiplyList(shape, ndim - 1), shape[ndim - 1]);
    return array;
}

/* Arrays [count] beside each other along an axis: all of one shape but for that. */
static PyArrayObject *join(b2py_state *state, PyArrayObject **arrays, Py_ssize_t count, int axis)
{
    b2py_place place = b2py_place_of(arrays[0]);
    int ndim = PyArray_NDIM(arrays[0]);
    npy_intp shape[NPY_MAXDIMS];
    memcpy(shape, PyArray_DIMS(arrays[0]), (size_t)ndim * sizeof *shape);
    for (Py_ssize_t i = 1; i < count; i++)
        shape[axis] += PyArray_DIM(arrays[i], axis);
    PyArrayObject *out = new_there(state, place, ndim, shape);
    if (!out)
        return NULL;
    b2_err err = {0};
    b2_device_array to = as_device_array(out);
    int status = 0;
    for (Py_ssize_t i = 0; status == 0 && i < count; i++) {
        b2_device_array from = as_device_array(arrays[i]);
        status = place.backend->convert(place.device, &to, &from, &err);
        to.data = (float *)to.data + from.shape[axis] * to.strides[axis];
    }
    if (status < 0 || settle(place, &err) < 0) {
        b2py_raise(state, &err);
        Py_CLEAR(out);
    }
    return out;
}

static int check_joined(PyArrayObject **arrays, Py_ssize_t count, int axis)
{
    int ndim = PyArray_NDIM(arrays[0]), same = axis >= 0 && axis < ndim && ndim <= B2_ARRAY_AXES;
    for (Py_ssize_t i = 0; same && i < count; i++) {
        same = PyArray_NDIM(arrays[i]) == ndim &&
               b2py_place_of(arrays[i]).device->index == b2py_place_of(arrays[0]).device->index;
        for (int d = 0; same && d < ndim; d++)
            same = d == axis || PyArray_DIM(arrays[i], d) == PyArray_DIM(arrays[0], d);
    }
    if (!same)
        PyErr_Format(PyExc_ValueError, "_join: expected arrays of one device and shape but for axis %d", axis);
    return same ? 0 : -1;
}

static PyObject *join_arrays(PyObject *module, PyObject *args)
{
    enum { MOST = 8 };
    b2py_state *state = b2py_state_of_module(module);
    PyObject *objects;
    PyArrayObject *arrays[MOST], *out = NULL;
    int axis;
    if (!PyArg_ParseTuple(args, "O!i", &PyTuple_Type, &objects, &axis))
        return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(objects), layouts = 0;
    while (layouts < count && layouts < MOST && (arrays[layouts] = b2py_layout(state, PyTuple_GET_ITEM(objects, layouts))))
        layouts++;
    if (count < 1 || layouts < count)
        PyErr_SetString(PyExc_TypeError, "_join: expected a tuple of up to 8 DeviceArrays");
    else if (check_joined(arrays, count, axis) == 0)
        out = join(state, arrays, count, axis);
    return b2py_give(state, (PyObject *)out);
}

/* ---- DeviceArray ---- */

typedef struct array_object {
    PyObject_HEAD
    PyArrayObject *layout; /* owned */
} array_object;

static PyArrayObject *layout_of(PyObject *self)
{
    return ((array_object *)self)->layout;
}

static b2py_state *state_of(PyObject *self)
{
    return b2py_state_of_type(Py_TYPE(self));
}

PyArrayObject *b2py_layout(b2py_state *state, PyObject *object)
{
    return Py_TYPE(object) == state->array_type ? layout_of(object) : NULL;
}

PyObject *b2py_give(b2py_state *state, PyObject *array)
{
    if (!array || !b2py_is_on_device((PyArrayObject *)array))
        return array;
    int ndim = PyArray_NDIM((PyArrayObject *)array);
    if (ndim > B2_ARRAY_AXES) {
        Py_DECREF(array);
        PyErr_Format(PyExc_ValueError, "DeviceArray: expected at most %d axes, found %d", B2_ARRAY_AXES, ndim);
        return NULL;
    }
    array_object *self = (array_object *)state->array_type->tp_alloc(state->array_type, 0);
    if (!self) {
        Py_DECREF(array);
        return NULL;
    }
    self->layout = (PyArrayObject *)array;
    return (PyObject *)self;
}

/* Whether an array that lies on a device lies on this one. */
static int check_place(PyArrayObject *array, const char *name, b2py_place place)
{
    int found = b2py_place_of(array).device->index;
    if (place.device && place.device->index == found)
        return 0;
    if (place.device)
        PyErr_Format(PyExc_ValueError, "%s: lies on cuda:%d, expected cuda:%d", name, found, place.device->index);
    else
        PyErr_Format(PyExc_ValueError, "%s: lies on cuda:%d, expected the host", name, found);
    return -1;
}

PyArrayObject *b2py_floats(b2py_state *state, PyObject *object, const char *name, int ndim, b2py_place place)
{
    PyArrayObject *array = b2py_layout(state, object);
    if (!array)
        return b2py_array(object, name, NPY_FLOAT32, ndim);
    if (check_place(array, name, place) < 0)
        return NULL;
    if (ndim >= 0 && PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d axes, found %d", name, ndim, PyArray_NDIM(array));
        return NULL;
    }
    int in_order = PyArray_IS_C_CONTIGUOUS(array) && (uintptr_t)PyArray_DATA(array) % B2_OUTER_ALIGNMENT == 0;
    return in_order ? (PyArrayObject *)Py_NewRef((PyObject *)array) : b2py_ordered(state, array);
}

static void array_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(layout_of(self));
    type->tp_free(self);
    Py_DECREF(type);
}

/* Around a view of the layout, which is taken over. */
static PyObject *view_of(PyObject *self, PyObject *layout)
{
    return b2py_give(state_of(self), layout);
}

static PyObject *array_shape(PyObject *self, void *Py_UNUSED(closure))
{
    return PyArray_IntTupleFromIntp(PyArray_NDIM(layout_of(self)), PyArray_DIMS(layout_of(self)));
}

static PyObject *array_ndim(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(PyArray_NDIM(layout_of(self)));
}

static PyObject *array_size(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(PyArray_SIZE(layout_of(self)));
}

static PyObject *array_dtype(PyObject *self, void *Py_UNUSED(closure))
{
    return Py_NewRef((PyObject *)PyArray_DESCR(layout_of(self)));
}

static PyObject *array_device(PyObject *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromFormat("cuda:%d", b2py_place_of(layout_of(self)).device->index);
}

static PyObject *array_transposed(PyObject *self, void *Py_UNUSED(closure))
{
    return view_of(self, PyArray_Transpose(layout_of(self), NULL));
}

static Py_ssize_t array_length(PyObject *self)
{
    if (PyArray_NDIM(layout_of(self)) > 0)
        return PyArray_DIM(layout_of(self), 0);
    PyErr_SetString(PyExc_TypeError, "DeviceArray: one without axes has no length");
    return -1;
}

/* An index that makes a view: integers, slices, None, an ellipsis. NumPy would read the data for any other; so it never sees
 * what only says that it is an integer: a tensor of torch may be a list of them. A new reference. */
static PyObject *basic_item(PyObject *item)
{
    if (PySlice_Check(item) || item == Py_None || item == Py_Ellipsis)
        return Py_NewRef(item);
    PyObject *number = PyIndex_Check(item) && !PyBool_Check(item) && !PyArray_Check(item) ? PyNumber_Index(item) : NULL;
    if (!number && (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError)))
        PyErr_Format(PyExc_TypeError, "DeviceArray: expected an index of integers and slices, found %s",
                     Py_TYPE(item)->tp_name);
    return number;
}

/* `key` as a tuple with an ellipsis at its end, for which NumPy gives a view also where all axes are indexed. */
static PyObject *basic_key(PyObject *key)
{
    PyObject *items = PyTuple_Check(key) ? PySequence_List(key) : PyList_New(0);
    int has_ellipsis = 0, status = items ? 0 : -1;
    if (status == 0 && !PyTuple_Check(key))
        status = PyList_Append(items, key);
    for (Py_ssize_t i = 0; status == 0 && i < PyList_GET_SIZE(items); i++) {
        PyObject *item = basic_item(PyList_GET_ITEM(items, i));
        has_ellipsis |= item == Py_Ellipsis;
        status = item ? PyList_SetItem(items, i, item) : -1;
    }
    if (status == 0 && !has_ellipsis)
        status = PyList_Append(items, Py_Ellipsis);
    PyObject *tuple = status == 0 ? PyList_AsTuple(items) : NULL;
    Py_XDECREF(items);
    return tuple;
}

static PyObject *array_item(PyObject *self, PyObject *key)
{
    PyObject *basic = basic_key(key);
    PyObject *view = basic ? PyObject_GetItem((PyObject *)layout_of(self), basic) : NULL;
    Py_XDECREF(basic);
    return view_of(self, view);
}

static PyObject *array_reshape(PyObject *self, PyObject *args)
{
    PyArrayObject *ordered = PyArray_IS_C_CONTIGUOUS(layout_of(self)) ? (PyArrayObject *)Py_NewRef((PyObject *)layout_of(self))
                                                                      : b2py_ordered(state_of(self), layout_of(self));
    PyObject *reshape = ordered ? PyObject_GetAttrString((PyObject *)ordered, "reshape") : NULL;
    PyObject *view = reshape ? PyObject_CallObject(reshape, args) : NULL;
    Py_XDECREF(reshape);
    Py_XDECREF(ordered);
    return view_of(self, view);
}

static PyObject *array_copy(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return view_of(self, (PyObject *)b2py_ordered(state_of(self), layout_of(self)));
}

static PyObject *array_numpy(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return b2py_to_host(state_of(self), layout_of(self));
}

static PyObject *array_interface(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO", names, &dtype, &copy))
        return NULL;
    if (copy == Py_False) {
        PyErr_SetString(PyExc_ValueError, "DeviceArray: what lies on a device comes to the host by a copy");
        return NULL;
    }
    PyObject *here = b2py_to_host(state_of(self), layout_of(self));
    PyObject *cast = here && dtype != Py_None ? PyObject_CallMethod(here, "astype", "O", dtype) : NULL;
    if (!here || dtype == Py_None)
        return here;
    Py_DECREF(here);
    return cast;
}

static PyObject *array_dlpack(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return b2py_dlpack(state_of(self), layout_of(self), args, kwargs);
}

static PyObject *array_dlpack_device(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return Py_BuildValue("ii", 2 /* kDLCUDA */, b2py_place_of(layout_of(self)).device->index);
}

static PyObject *array_repr(PyObject *self)
{
    PyObject *shape = array_shape(self, NULL), *text = NULL;
    if (shape)
        text = PyUnicode_FromFormat("DeviceArray(shape=%R, dtype=%S, device=cuda:%d)", shape,
                                    (PyObject *)PyArray_DESCR(layout_of(self)),
                                    b2py_place_of(layout_of(self)).device->index);
    Py_XDECREF(shape);
    return text;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef array_methods[] = {
    {"reshape", array_reshape, METH_VARARGS, "reshape(*shape) -> DeviceArray: the same elements in another shape."},
    {"copy", array_copy, METH_NOARGS, "copy() -> DeviceArray: the same elements in order, in memory of their own."},
    {"numpy", array_numpy, METH_NOARGS, "numpy() -> a copy on the host."},
    {"__array__", KEYWORDS(array_interface), "__array__(dtype=None, copy=None) -> a copy on the host."},
    {"__dlpack__", KEYWORDS(array_dlpack),
     "__dlpack__(*, stream=None, max_version=None, dl_device=None, copy=None) -> capsule (array API standard, 2023)"},
    {"__dlpack_device__", array_dlpack_device, METH_NOARGS, "__dlpack_device__() -> (2, number of the device)"},
    {0},
};

static PyGetSetDef array_getset[] = {
    {"shape", array_shape, NULL, "Elements along each axis.", NULL},
    {"ndim", array_ndim, NULL, "Axes.", NULL},
    {"size", array_size, NULL, "Elements.", NULL},
    {"dtype", array_dtype, NULL, "numpy.float32.", NULL},
    {"device", array_device, NULL, "\"cuda:0\" ...", NULL},
    {"T", array_transposed, NULL, "A view with the axes in reverse.", NULL},
    {0},
};

static PyType_Slot array_slots[] = {
    {Py_tp_doc, "A float32 array on a device, which results are where inputs were. torch.from_dlpack, cupy.from_dlpack and"
                " others take it without a copy; numpy() copies it to the host. An index is of integers and slices."},
    {Py_tp_dealloc, array_dealloc},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_getset},
    {Py_tp_repr, array_repr},
    {Py_mp_subscript, array_item},
    {Py_mp_length, array_length},
    {0, NULL},
};

static PyType_Spec array_spec = {
    .name = "blip2c.DeviceArray",
    .basicsize = sizeof(array_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = array_slots,
};

static PyMethodDef functions[] = {
    {"_join", join_arrays, METH_VARARGS, "_join(arrays, axis) -> DeviceArray: arrays beside each other"},
    {0},
};

int b2py_add_arrays(PyObject *module)
{
    b2py_state *state = b2py_state_of_module(module);
    state->array_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &array_spec, NULL);
    return state->array_type && PyModule_AddType(module, state->array_type) == 0 ? PyModule_AddFunctions(module, functions)
                                                                                 : -1;
}
