/* Texts against the pictures of an index, on NumPy arrays. blip2c/index.py keeps the records. */
#include "python/py_kernel_call.h"

/* records [N, bytes] of `queries` vectors as wide as texts [T, P]; 0, or -1 with the exception set. */
static int records_of(b2_records *r, PyArrayObject *texts, PyArrayObject *array, long long queries, const char *dtype)
{
    *r = (b2_records){.data = PyArray_DATA(array),
                      .pictures = PyArray_DIM(array, 0),
                      .queries = queries,
                      .width = PyArray_DIM(texts, 1)};
    if (b2py_dtype_named(&r->dtype, dtype) < 0 || (r->dtype != B2_F16 && r->dtype != B2_I8)) {
        PyErr_Format(PyExc_ValueError, "dtype: expected float16 or int8, found %s", dtype);
        return -1;
    }
    if (queries < 1 || queries > 65536 || r->width < 1 || r->width > 65536) {
        PyErr_Format(PyExc_ValueError, "expected 1 to 65536 vectors of a width of 1 to 65536, found %lld of %zd", queries,
                     (Py_ssize_t)r->width);
        return -1;
    }
    if (PyArray_DIM(array, 1) != b2_record_bytes(r)) {
        PyErr_Format(PyExc_ValueError, "records: expected %lld bytes each (%lld vectors of %zd in %s), found %zd",
                     (long long)b2_record_bytes(r), queries, (Py_ssize_t)r->width, dtype,
                     (Py_ssize_t)PyArray_DIM(array, 1));
        return -1;
    }
    return 0;
}

static PyArrayObject *run(PyObject *module, PyArrayObject *texts, b2_records records, b2py_place place)
{
    npy_intp shape[2] = {PyArray_DIM(texts, 0), (npy_intp)records.pictures};
    PyArrayObject *out = (PyArrayObject *)PyArray_SimpleNew(2, shape, NPY_FLOAT32);
    if (!out)
        return NULL;
    memset(PyArray_DATA(out), 0xff, (size_t)PyArray_NBYTES(out));
    b2py_kernel_call k;
    if (b2py_kernel_begin(&k, module, place, (b2py_plan){1, 1, 0, 1}) < 0) {
        Py_DECREF(out);
        return NULL;
    }
    records.data = b2py_to_device(&k, records.data, (size_t)(records.pictures * b2_record_bytes(&records)));
    if (b2py_kernel_end(&k, module,
                        b2_picture_scores(&k.ctx, b2py_output(&k, out), b2py_input(&k, texts), &records, &k.err)) < 0)
        Py_CLEAR(out);
    return out;
}

static PyObject *picture_scores(PyObject *module, PyObject *args)
{
    PyObject *objects[2];
    long long queries;
    const char *dtype, *device = "cpu";
    b2_records records;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOLs|s", &objects[0], &objects[1], &queries, &dtype, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *texts = b2py_array(objects[0], "texts", NPY_FLOAT32, 2), *out = NULL;
    PyArrayObject *array = texts ? b2py_array(objects[1], "records", NPY_UINT8, 2) : NULL;
    if (array && records_of(&records, texts, array, queries, dtype) == 0)
        out = run(module, texts, records, place);
    Py_XDECREF(texts);
    Py_XDECREF(array);
    return (PyObject *)out;
}

static PyMethodDef index_methods[] = {
    {"_picture_scores", picture_scores, METH_VARARGS, "_picture_scores(texts, records, queries, dtype, device=\"cpu\") -> array [T, N]"},
    {0},
};

int b2py_add_index(PyObject *module)
{
    return PyModule_AddFunctions(module, index_methods);
}
