/* blip2c._core.Model, continued: its weights as arrays, as a packed file, and what they are held as. */
#include "python/py_model.h"

#include <stdatomic.h>
#include <string.h>

#include "core/memory.h"
#include "ops/weights.h"

typedef struct collector {
    b2_weight_visitor visitor;
    b2py_state *state;
    const char *only;          /* the one that is wanted; NULL: all */
    PyObject *result;          /* dict of arrays, or list of names */
    const b2_weight **weights; /* [count] */
    void **data;               /* [count] of the arrays in result */
    int64_t count;
    atomic_int failed;
} collector;

static int count_weight(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    collector *c = (collector *)visitor;
    (void)shape, (void)rank, (void)err;
    c->count += !c->only || strcmp(c->only, weight->name) == 0;
    return 0;
}

static int add_array(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    static const int numpy_types[B2_DTYPE_COUNT] = {NPY_FLOAT32, NPY_FLOAT16, NPY_UINT16, NPY_FLOAT32, NPY_FLOAT32};
    collector *c = (collector *)visitor;
    npy_intp dims[4];
    if (c->only && strcmp(c->only, weight->name) != 0)
        return 0;
    for (int i = 0; i < rank; i++)
        dims[i] = (npy_intp)shape[i];
    PyObject *array = PyArray_SimpleNew(rank, dims, numpy_types[weight->dtype]);
    int status = array ? PyDict_SetItemString(c->result, weight->name, array) : -1;
    if (status == 0) {
        c->weights[c->count] = weight;
        c->data[c->count++] = PyArray_DATA((PyArrayObject *)array);
    }
    Py_XDECREF(array);
    return status < 0 ? b2_fail(err, B2_E_CALLBACK, "%s", weight->name) : 0;
}

static void unpack_one(void *argument, int64_t index, int worker)
{
    collector *c = argument;
    b2_err err = {0};
    (void)worker;
    if (b2_weight_unpack(c->data[index], c->weights[index], &err) < 0)
        atomic_store(&c->failed, 1);
}

static int make_arrays(collector *c, const b2_blip2 *model, b2_err *err)
{
    if (!c->result)
        return b2_fail(err, B2_E_CALLBACK, "weights");
    c->visitor.fn = count_weight;
    if (b2_blip2_visit(model, &c->visitor, err) < 0)
        return -1;
    c->weights = b2_alloc((size_t)c->count, sizeof *c->weights, "weights", err);
    c->data = b2_alloc((size_t)c->count, sizeof *c->data, "weights", err);
    c->count = 0;
    c->visitor.fn = add_array;
    return c->weights && c->data ? b2_blip2_visit(model, &c->visitor, err) : -1;
}

static int unpack_all(collector *c, b2_err *err)
{
    b2py_call frame;
    b2_cancel *cancel = b2py_call_begin(&frame);
    int status = b2_pool_run(c->state->pool, c->count, unpack_one, c, cancel, err);
    b2py_call_end(&frame);
    if (status == 0 && atomic_load(&c->failed))
        return b2_fail(err, B2_E_INTERNAL, "weights: one could not be unpacked");
    return status;
}

PyObject *b2py_model_weights(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"only", NULL};
    const b2_blip2 *model = b2py_loaded_model(self);
    const char *only = NULL;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "|z", names, &only))
        return NULL;
    b2_err err = {0};
    collector c = {.state = b2py_state_of_type(Py_TYPE(self)), .only = only, .result = PyDict_New()};
    int status = make_arrays(&c, model, &err);
    if (status == 0)
        status = unpack_all(&c, &err);
    b2_free(c.weights);
    b2_free(c.data);
    if (status == 0)
        return c.result;
    Py_XDECREF(c.result);
    return b2py_raise(c.state, &err);
}

static int append_weight_name(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank,
                              b2_err *err)
{
    PyObject *name = PyUnicode_FromString(weight->name);
    (void)shape, (void)rank;
    int status = name ? PyList_Append(((collector *)visitor)->result, name) : -1;
    Py_XDECREF(name);
    return status < 0 ? b2_fail(err, B2_E_CALLBACK, "%s", weight->name) : 0;
}

PyObject *b2py_model_weight_names(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const b2_blip2 *model = b2py_loaded_model(self);
    b2_err err = {0};
    collector c = {.visitor = {append_weight_name}, .result = model ? PyList_New(0) : NULL};
    if (!c.result)
        return NULL;
    if (b2_blip2_visit(model, &c.visitor, &err) == 0)
        return c.result;
    Py_DECREF(c.result);
    return b2py_raise(b2py_state_of_type(Py_TYPE(self)), &err);
}

/* ---- packed files ---- */

/* UTF-8 of a str without NUL, alive as long as the object; else NULL with an exception. */
static const char *text_of(PyObject *object)
{
    Py_ssize_t bytes = 0;
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "metadata: expected a str, found %s", Py_TYPE(object)->tp_name);
        return NULL;
    }
    const char *text = PyUnicode_AsUTF8AndSize(object, &bytes);
    if (text && strlen(text) != (size_t)bytes) {
        PyErr_Format(PyExc_ValueError, "metadata: %R holds the character NUL", object);
        return NULL;
    }
    return text;
}

static int read_metadata(const char **metadata, PyObject *dict)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (int64_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2)
        if (!(metadata[i] = text_of(key)) || !(metadata[i + 1] = text_of(value)))
            return -1;
    return 0;
}

PyObject *b2py_model_save_packed(PyObject *self, PyObject *args)
{
    const b2_blip2 *model = b2py_loaded_model(self);
    PyObject *path = NULL, *given;
    b2_err err = {0};
    if (!model || !PyArg_ParseTuple(args, "O&O!:save_packed", PyUnicode_FSConverter, &path, &PyDict_Type, &given))
        return NULL;
    PyObject *dict = PyDict_Copy(given); /* nobody else changes it meanwhile */
    int64_t count = dict ? PyDict_Size(dict) : 0;
    const char **metadata = dict ? b2_alloc(2 * (size_t)count, sizeof *metadata, "metadata", &err) : NULL;
    int status = metadata ? read_metadata(metadata, dict) : -1;
    if (status == 0) {
        b2py_call frame;
        b2_cancel *cancel = b2py_call_begin(&frame);
        status = b2_blip2_save_packed(model, PyBytes_AS_STRING(path), metadata, count, cancel, &err);
        b2py_call_end(&frame);
    }
    if (status < 0)
        b2py_raise(b2py_state_of_type(Py_TYPE(self)), &err);
    b2_free(metadata);
    Py_XDECREF(dict);
    Py_DECREF(path);
    return status < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- what they are held as ---- */

PyObject *b2py_model_dtype(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = b2py_loaded_model(self);
    return model ? PyUnicode_FromString(b2_dtype_word(model->dtype)) : NULL;
}

PyObject *b2py_model_dtypes(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = b2py_loaded_model(self);
    if (!model)
        return NULL;
    const struct {
        const char *name;
        int present;
        b2_dtype dtype;
    } parts[] = {{"vision", model->vit.layers != NULL, model->dtypes[B2_PART_VISION]},
                 {"qformer", 1, model->dtypes[B2_PART_QFORMER]},
                 {"language", model->lm != NULL, model->dtypes[B2_PART_LANGUAGE]}};
    PyObject *result = PyDict_New();
    for (size_t i = 0; result && i < sizeof parts / sizeof *parts; i++) {
        PyObject *name = parts[i].present ? PyUnicode_FromString(b2_dtype_word(parts[i].dtype)) : NULL;
        if (parts[i].present && (!name || PyDict_SetItemString(result, parts[i].name, name) < 0))
            Py_CLEAR(result);
        Py_XDECREF(name);
    }
    return result;
}

PyObject *b2py_model_policies(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = b2py_loaded_model(self);
    return model ? PyUnicode_FromString(model->policies) : NULL;
}

PyObject *b2py_model_parameters(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = b2py_loaded_model(self);
    return model ? PyLong_FromLongLong(model->parameters) : NULL;
}

PyObject *b2py_model_nbytes(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = b2py_loaded_model(self);
    return model ? PyLong_FromLongLong(model->bytes) : NULL;
}
