/* Weights among the kernels on NumPy arrays: matrices as stored, packed, unpacked, converted, and how a function of
 * py_kernels.c reads one from its argument.
 *
 * A packed weight is a capsule that owns a b2_weight. */
#include "python/py_kernels.h"
#include "python/py_device.h"
#include "python/py_kernel_call.h"

#include "core/memory.h"
#include "ops/weights.h"

static const char weight_capsule[] = "blip2c.weight";

/* A matrix as stored: float32, float16, or uint16 with bfloat16 bits. */
static PyArrayObject *matrix(b2_weight *w, PyObject *object, const char *name)
{
    int type = PyArray_Check(object) ? PyArray_TYPE((PyArrayObject *)object) : NPY_FLOAT32;
    if (type != NPY_FLOAT32 && type != NPY_FLOAT16 && type != NPY_UINT16) {
        PyErr_Format(PyExc_TypeError, "%s: expected an array of float32, float16 or uint16 (bfloat16 bits), found %S",
                     name, (PyObject *)PyArray_DESCR((PyArrayObject *)object));
        return NULL;
    }
    PyArrayObject *array = b2py_array(object, name, type, 2);
    if (!array)
        return NULL;
    *w = (b2_weight){.name = name, .data = PyArray_DATA(array), .n = PyArray_DIM(array, 0), .k = PyArray_DIM(array, 1)};
    w->dtype = type == NPY_FLOAT16 ? B2_F16 : type == NPY_UINT16 ? B2_BF16 : B2_F32;
    w->layout = B2_ROWS;
    if (w->n < 1 || w->k < 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected a matrix with elements, found shape [%zd, %zd]", name,
                     (Py_ssize_t)w->n, (Py_ssize_t)w->k);
        Py_CLEAR(array);
    }
    return array;
}

/* A matrix on a device, as it lies where its rows fill what devices have rows in; else by way of the host. */
static PyObject *device_matrix(b2_weight *w, PyObject *module, PyObject *object, const char *name, b2py_place place)
{
    b2py_state *state = b2py_state_of_module(module);
    PyArrayObject *array = b2py_floats(state, object, name, 2, place);
    if (!array)
        return NULL;
    int64_t n = PyArray_DIM(array, 0), k = PyArray_DIM(array, 1);
    if (n > 0 && k > 0 && k == b2_strided_ld(k)) {
        *w = (b2_weight){.name = name, .data = PyArray_DATA(array), .n = n, .k = k, .dtype = B2_F32, .layout = B2_STRIDED,
                         .memory = place.device->memory};
        return (PyObject *)array;
    }
    PyObject *here = b2py_to_host(state, array);
    PyObject *owner = here ? (PyObject *)matrix(w, here, name) : NULL;
    Py_DECREF(array);
    Py_XDECREF(here);
    return owner;
}

int b2py_weight_argument(b2_weight *w, PyObject **owner, PyObject *module, PyObject *object, const char *name,
                         b2py_place place)
{
    if (b2py_layout(b2py_state_of_module(module), object)) {
        *owner = device_matrix(w, module, object, name, place);
        return *owner ? 0 : -1;
    }
    if (PyCapsule_IsValid(object, weight_capsule)) {
        *w = *(b2_weight *)PyCapsule_GetPointer(object, weight_capsule);
        *owner = Py_NewRef(object);
        return 0;
    }
    *owner = (PyObject *)matrix(w, object, name);
    return *owner ? 0 : -1;
}

static void release_weight(PyObject *capsule)
{
    b2_weight *w = PyCapsule_GetPointer(capsule, weight_capsule);
    b2_weight_release(w);
    b2_free(w);
}

/* Of the types that arrays have. */
static int dtype_named(b2_dtype *dtype, const char *name)
{
    if (b2py_dtype_named(dtype, name) == 0 && !b2_dtype_is_quantised(*dtype))
        return 0;
    PyErr_Format(PyExc_ValueError, "dtype: expected float32, float16 or bfloat16, found %s", name);
    return -1;
}

static int format_named(b2_format *format, const char *name, int pairs)
{
    if (name && b2py_dtype_named(&format->dtype, name) < 0) {
        PyErr_Format(PyExc_ValueError, "dtype: expected float32, float16, bfloat16, int8 or int4, found %s", name);
        return -1;
    }
    if (pairs && format->dtype != B2_BF16) {
        PyErr_Format(PyExc_ValueError, "pairs: expected dtype bfloat16, found %s", b2_dtype_word(format->dtype));
        return -1;
    }
    format->layout = b2_dtype_is_quantised(format->dtype) ? B2_QUADS : pairs ? B2_PAIRS : B2_PANELS;
    return 0;
}

static PyObject *pack_weight(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *dtype_name = NULL;
    const char *device_name;
    int pairs, index;
    if (!PyArg_ParseTuple(args, "Ozps", &object, &dtype_name, &pairs, &device_name) ||
        b2py_read_device(&index, device_name) < 0)
        return NULL;
    b2py_state *state = b2py_state_of_module(module);
    b2_err err = {0};
    b2_device *device = index < 0 ? NULL : b2py_kernel_device(state, index, &err);
    if (index >= 0 && !device)
        return b2py_raise(state, &err);
    b2_weight source;
    PyArrayObject *array = matrix(&source, object, "weight");
    if (!array)
        return NULL;
    b2_format format = {.dtype = source.dtype};
    if (format_named(&format, dtype_name, pairs) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    b2_weight *packed = b2_alloc_zeroed(1, sizeof *packed, "packed weight", &err);
    int status = packed ? 0 : -1;
    if (packed) {
        b2py_call call;
        b2_cancel *cancel = b2py_call_begin(&call);
        status = device ? b2_weight_stride(packed, &source, format.dtype, device->memory, state->pool, cancel, &err)
                        : b2_weight_pack(packed, &source, format, state->pool, cancel, &err);
        b2py_call_end(&call);
    }
    Py_DECREF(array);
    PyObject *capsule = NULL;
    if (status == 0 && (capsule = PyCapsule_New(packed, weight_capsule, release_weight)))
        return capsule;
    if (packed)
        b2_weight_release(packed);
    b2_free(packed);
    return status < 0 ? b2py_raise(state, &err) : NULL;
}

static int numpy_type(b2_dtype dtype)
{
    return dtype == B2_F32 ? NPY_FLOAT32 : dtype == B2_F16 ? NPY_FLOAT16 : NPY_UINT16;
}

static PyObject *unpack_weight(PyObject *module, PyObject *capsule)
{
    const b2_weight *w = PyCapsule_GetPointer(capsule, weight_capsule);
    if (!w)
        return NULL;
    npy_intp shape[2] = {(npy_intp)w->n, (npy_intp)w->k};
    PyObject *out = PyArray_SimpleNew(2, shape, b2_dtype_is_quantised(w->dtype) ? NPY_FLOAT32 : numpy_type(w->dtype));
    b2_err err = {0};
    if (out && b2_weight_unpack(PyArray_DATA((PyArrayObject *)out), w, &err) < 0) {
        Py_DECREF(out);
        return b2py_raise(b2py_state_of_module(module), &err);
    }
    return out;
}

static PyObject *array_copy(int type, const void *data, npy_intp count, size_t size)
{
    PyObject *out = PyArray_SimpleNew(1, &count, type);
    if (out && count)
        memcpy(PyArray_DATA((PyArrayObject *)out), data, (size_t)count * size);
    return out;
}

/* The parts of a quantised weight as they lie in memory. */
static PyObject *weight_parts(PyObject *module, PyObject *capsule)
{
    const b2_weight *w = PyCapsule_GetPointer(capsule, weight_capsule);
    (void)module;
    if (!w)
        return NULL;
    if (!b2_dtype_is_quantised(w->dtype)) {
        PyErr_Format(PyExc_ValueError, "expected a weight of int8 or int4, found %s", b2_dtype_word(w->dtype));
        return NULL;
    }
    if (w->memory) {
        PyErr_SetString(PyExc_ValueError, "expected a weight on the processor, found one on a device");
        return NULL;
    }
    npy_intp rows = (npy_intp)((w->n + B2_PANEL - 1) / B2_PANEL * B2_PANEL);
    npy_intp bytes = rows * (npy_intp)((w->k + 31) / 32 * 32) / (w->dtype == B2_I4 ? 2 : 1);
    npy_intp scales = rows * (npy_intp)((w->k + w->group - 1) / w->group);
    int type = w->dtype == B2_I4 ? NPY_FLOAT16 : NPY_FLOAT32;
    return Py_BuildValue("sLNNN", b2_dtype_word(w->dtype), (long long)w->group,
                         array_copy(NPY_UINT8, w->data, bytes, 1),
                         array_copy(type, w->scales, scales, type == NPY_FLOAT16 ? 2 : 4),
                         array_copy(NPY_FLOAT32, w->column_scales, w->column_scales ? (npy_intp)w->k : 0, 4));
}

static PyObject *convert(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *name;
    (void)module;
    if (!PyArg_ParseTuple(args, "Os", &object, &name))
        return NULL;
    b2_weight source;
    b2_dtype dtype;
    PyArrayObject *array = matrix(&source, object, "x");
    if (!array || dtype_named(&dtype, name) < 0) {
        Py_XDECREF(array);
        return NULL;
    }
    PyObject *out = PyArray_SimpleNew(2, PyArray_DIMS(array), numpy_type(dtype));
    int64_t overflows = 0;
    if (out)
        overflows = b2_convert(PyArray_DATA((PyArrayObject *)out), dtype, source.data, source.dtype,
                               source.n * source.k);
    Py_DECREF(array);
    return out ? Py_BuildValue("NL", out, (long long)overflows) : NULL;
}

static PyMethodDef weight_methods[] = {
    {"_pack_weight", pack_weight, METH_VARARGS, "_pack_weight(weight, dtype, pairs, device) -> capsule"},
    {"_unpack_weight", unpack_weight, METH_O, "_unpack_weight(capsule) -> array [n, k]"},
    {"_weight_parts", weight_parts, METH_O, "_weight_parts(capsule) -> (dtype, group, bytes, scales, column scales)"},
    {"_convert", convert, METH_VARARGS, "_convert(x, dtype) -> (array, values that became infinite)"},
    {0},
};

int b2py_add_weight_kernels(PyObject *module)
{
    return PyModule_AddFunctions(module, weight_methods);
}
