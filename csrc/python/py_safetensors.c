/* SafetensorsFile, parse_safetensors, write_safetensors: the files of weights for Python, and check_json for
 * blip2c.checkpoint. The GIL is released while a file is opened, copied from or written. */
#include "python/py_common.h"

#include "core/memory.h"
#include "io/json.h"
#include "io/safetensors.h"

typedef struct file_object {
    PyObject_HEAD
    b2_st_file file; /* never changes after __new__, so threads may share it */
} file_object;

/* BF16 and the 8-bit floats have no NumPy type of their own: their bits. */
static const int numpy_types[B2_ST_DTYPES] = {
    [B2_ST_BOOL] = NPY_BOOL,     [B2_ST_U8] = NPY_UINT8,      [B2_ST_I8] = NPY_INT8,
    [B2_ST_F8_E5M2] = NPY_UINT8, [B2_ST_F8_E4M3] = NPY_UINT8, [B2_ST_I16] = NPY_INT16,
    [B2_ST_U16] = NPY_UINT16,    [B2_ST_F16] = NPY_FLOAT16,   [B2_ST_BF16] = NPY_UINT16,
    [B2_ST_I32] = NPY_INT32,     [B2_ST_U32] = NPY_UINT32,    [B2_ST_F32] = NPY_FLOAT32,
    [B2_ST_F64] = NPY_FLOAT64,   [B2_ST_I64] = NPY_INT64,     [B2_ST_U64] = NPY_UINT64,
};

static PyObject *file_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"path", NULL};
    PyObject *path = NULL;
    b2_err err = {0};
    int status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&:SafetensorsFile", keywords, PyUnicode_FSConverter, &path))
        return NULL;
    file_object *self = (file_object *)type->tp_alloc(type, 0);
    if (!self) {
        Py_DECREF(path);
        return NULL;
    }
    const char *name = PyBytes_AS_STRING(path);
    Py_BEGIN_ALLOW_THREADS
    status = b2_st_open(&self->file, name, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status < 0) {
        Py_DECREF(self);
        return b2py_raise(b2py_state_of_type(type), &err);
    }
    return (PyObject *)self;
}

static void file_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    b2_st_close(&((file_object *)self)->file);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *file_names(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const b2_st_file *file = &((file_object *)self)->file;
    PyObject *names = PyList_New((Py_ssize_t)file->count);
    for (int64_t i = 0; names && i < file->count; i++) {
        PyObject *name = PyUnicode_FromString(file->tensors[i].name);
        if (!name) {
            Py_CLEAR(names);
            break;
        }
        PyList_SET_ITEM(names, (Py_ssize_t)i, name);
    }
    return names;
}

static PyObject *file_metadata(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const b2_st_file *file = &((file_object *)self)->file;
    PyObject *metadata = PyDict_New();
    for (int64_t i = 0; metadata && i < file->metadata_count; i++) {
        PyObject *value = PyUnicode_FromString(file->metadata[2 * i + 1]);
        if (!value || PyDict_SetItemString(metadata, file->metadata[2 * i], value) < 0)
            Py_CLEAR(metadata);
        Py_XDECREF(value);
    }
    return metadata;
}

static const b2_st_tensor *find(PyObject *self, PyObject *name)
{
    if (!PyUnicode_Check(name)) {
        PyErr_Format(PyExc_TypeError, "name: expected a str, found %s", Py_TYPE(name)->tp_name);
        return NULL;
    }
    Py_ssize_t bytes;
    const char *text = PyUnicode_AsUTF8AndSize(name, &bytes);
    if (!text)
        return NULL;
    const b2_st_tensor *tensor =
        strlen(text) == (size_t)bytes ? b2_st_find(&((file_object *)self)->file, text) : NULL;
    if (!tensor)
        PyErr_SetObject(PyExc_KeyError, name);
    return tensor;
}

static PyObject *file_info(PyObject *self, PyObject *name)
{
    const b2_st_tensor *tensor = find(self, name);
    PyObject *shape = tensor ? PyTuple_New(tensor->rank) : NULL;
    for (int i = 0; shape && i < tensor->rank; i++) {
        PyObject *length = PyLong_FromLongLong(tensor->shape[i]);
        if (!length)
            Py_CLEAR(shape);
        else
            PyTuple_SET_ITEM(shape, i, length);
    }
    return shape ? Py_BuildValue("(sN)", b2_st_dtype_name(tensor->dtype), shape) : NULL;
}

static PyObject *file_tensor(PyObject *self, PyObject *name)
{
    const b2_st_tensor *tensor = find(self, name);
    npy_intp shape[B2_ST_MAX_RANK];
    if (!tensor)
        return NULL;
    for (int i = 0; i < tensor->rank; i++)
        shape[i] = (npy_intp)tensor->shape[i];
    PyObject *array = PyArray_SimpleNew(tensor->rank, shape, numpy_types[tensor->dtype]);
    if (!array || tensor->bytes == 0)
        return array;
    unsigned char *out = PyArray_DATA((PyArrayObject *)array);
    Py_BEGIN_ALLOW_THREADS
    memcpy(out, tensor->data, tensor->bytes);
    for (size_t i = 0; tensor->dtype == B2_ST_BOOL && i < tensor->bytes; i++)
        out[i] = out[i] != 0; /* NumPy computes with bools that are 0 or 1 */
    Py_END_ALLOW_THREADS
    return array;
}

static PyMethodDef file_methods[] = {
    {"names", file_names, METH_NOARGS, "names() -> list[str]\n\nThe tensors in the order of their bytes."},
    {"metadata", file_metadata, METH_NOARGS, "metadata() -> dict[str, str]\n\nThe entries of __metadata__."},
    {"info", file_info, METH_O, "info(name) -> (dtype, shape)\n\nFor example (\"F16\", (768, 1408)). KeyError if absent."},
    {"tensor", file_tensor, METH_O,
     "tensor(name) -> numpy.ndarray\n\nA copy, in the NumPy dtype of the same name; BF16 as uint16, F8 types as uint8 "
     "bits.\nKeyError if absent."},
    {0},
};

static PyType_Slot file_slots[] = {
    {Py_tp_doc, "SafetensorsFile(path)\n\nA safetensors file, mapped and validated: CheckpointError names the rule that it "
                "breaks,\nOSError says why it cannot be read. https://github.com/huggingface/safetensors"},
    {Py_tp_new, file_new},
    {Py_tp_dealloc, file_dealloc},
    {Py_tp_methods, file_methods},
    {0, NULL},
};

static PyType_Spec file_spec = {
    .name = "blip2c._core.SafetensorsFile",
    .basicsize = sizeof(file_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = file_slots,
};

static PyObject *parse_safetensors(PyObject *module, PyObject *data)
{
    b2_st_file file;
    b2_err err = {0};
    Py_buffer bytes;
    int status;
    if (PyObject_GetBuffer(data, &bytes, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = b2_st_parse(&file, bytes.buf ? bytes.buf : "", (size_t)bytes.len, "<bytes>", &err);
    if (status == 0)
        b2_st_close(&file);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&bytes);
    if (status < 0)
        return b2py_raise(b2py_state_of_module(module), &err);
    Py_RETURN_NONE;
}

static PyObject *check_json(PyObject *module, PyObject *args)
{
    b2_json json;
    b2_err err = {0};
    Py_buffer bytes;
    const char *where;
    int status;
    if (!PyArg_ParseTuple(args, "y*s:_check_json", &bytes, &where))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    b2_json_begin(&json, bytes.buf ? bytes.buf : "", (size_t)bytes.len, where);
    status = b2_json_skip(&json, &err) < 0 ? -1 : b2_json_finish(&json, &err);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&bytes);
    if (status < 0)
        return b2py_raise(b2py_state_of_module(module), &err);
    Py_RETURN_NONE;
}

/* What a call of write_safetensors holds while the GIL is released. */
typedef struct write_call {
    PyObject *keep;        /* list: arrays and strings that the pointers below belong to */
    b2_st_source *sources; /* [count] */
    const char **metadata; /* [2 * metadata_count] */
    Py_ssize_t count;
    Py_ssize_t metadata_count;
} write_call;

/* UTF-8 of `object`, kept alive by call->keep; refuses what is no str and what holds NUL. */
static const char *text_of(write_call *call, PyObject *object, const char *what)
{
    Py_ssize_t bytes;
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a str, found %s", what, Py_TYPE(object)->tp_name);
        return NULL;
    }
    const char *text = PyUnicode_AsUTF8AndSize(object, &bytes);
    if (!text)
        return NULL;
    if (strlen(text) != (size_t)bytes) {
        PyErr_Format(PyExc_ValueError, "%s: %R holds the character NUL", what, object);
        return NULL;
    }
    return PyList_Append(call->keep, object) < 0 ? NULL : text;
}

/* The dtype asked for in `dtypes`, or the one of the same name as the array's. */
static int dtype_of(PyObject *name, PyArrayObject *array, PyObject *dtypes, b2_st_dtype *dtype)
{
    PyObject *asked = PyDict_GetItemWithError(dtypes, name);
    if (!asked && PyErr_Occurred())
        return -1;
    const char *text = asked ? PyUnicode_AsUTF8(asked) : NULL;
    if (asked && !text)
        return -1;
    int found = text ? b2_st_dtype_of(text) : -1;
    if (asked && found < 0) {
        PyErr_Format(PyExc_ValueError, "dtypes[%R]: %R is not a safetensors dtype that blip2c writes", name, asked);
        return -1;
    }
    for (int i = 0; i < B2_ST_DTYPES && !asked && found < 0; i++)
        if (i != B2_ST_F8_E5M2 && i != B2_ST_F8_E4M3 && i != B2_ST_BF16 &&
            PyArray_EquivTypenums(PyArray_TYPE(array), numpy_types[i]))
            found = i;
    if (found < 0 || !PyArray_EquivTypenums(PyArray_TYPE(array), numpy_types[found])) {
        PyErr_Format(PyExc_TypeError, "%U: an array of %S cannot be stored as %s", name, (PyObject *)PyArray_DESCR(array),
                     found < 0 ? "a safetensors dtype" : b2_st_dtype_name((b2_st_dtype)found));
        return -1;
    }
    *dtype = (b2_st_dtype)found;
    return 0;
}

static int add_source(write_call *call, PyObject *name, PyObject *object, PyObject *dtypes)
{
    b2_st_source *source = &call->sources[call->count];
    source->name = text_of(call, name, "name of a tensor");
    if (!source->name)
        return -1;
    PyArrayObject *given = b2py_array(object, source->name, PyArray_Check(object) ? PyArray_TYPE((PyArrayObject *)object) : 0, -1);
    if (!given)
        return -1;
    int kept = PyList_Append(call->keep, (PyObject *)given);
    Py_DECREF(given);
    if (kept < 0 || dtype_of(name, given, dtypes, &source->dtype) < 0)
        return -1;
    source->rank = PyArray_NDIM(given);
    if (source->rank > B2_ST_MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%U: expected at most 8 axes, found %d", name, source->rank);
        return -1;
    }
    for (int i = 0; i < source->rank; i++)
        source->shape[i] = PyArray_DIM(given, i);
    source->data = PyArray_DATA(given);
    source->data_bytes = (size_t)PyArray_NBYTES(given);
    call->count++;
    return 0;
}

/* `tensors` and `metadata` (or NULL) are private copies: nothing can change them meanwhile. */
static int collect(write_call *call, PyObject *tensors, PyObject *dtypes, PyObject *metadata)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    b2_err err = {0};
    call->keep = PyList_New(0);
    call->sources = b2_alloc_zeroed((size_t)PyDict_Size(tensors), sizeof *call->sources, "tensors", &err);
    call->metadata = b2_alloc(metadata ? 2 * (size_t)PyDict_Size(metadata) : 0, sizeof *call->metadata, "metadata", &err);
    if (!call->keep || !call->sources || !call->metadata) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        return -1;
    }
    while (PyDict_Next(tensors, &at, &key, &value))
        if (add_source(call, key, value, dtypes) < 0)
            return -1;
    for (at = 0; metadata && PyDict_Next(metadata, &at, &key, &value); call->metadata_count++) {
        const char **pair = &call->metadata[2 * call->metadata_count];
        if (!(pair[0] = text_of(call, key, "metadata")) || !(pair[1] = text_of(call, value, "metadata")))
            return -1;
    }
    return 0;
}

static PyObject *copy_of_mapping(PyObject *mapping)
{
    PyObject *copy = PyDict_New();
    if (copy && PyDict_Update(copy, mapping) < 0)
        Py_CLEAR(copy);
    return copy;
}

static PyObject *write_collected(PyObject *module, const char *path, write_call *call)
{
    b2_err err = {0};
    b2py_call frame;
    b2_cancel *cancel = b2py_call_begin(&frame);
    int status = b2_st_write(path, call->sources, call->count, call->metadata, call->metadata_count, cancel, &err);
    b2py_call_end(&frame);
    if (status < 0)
        return b2py_raise(b2py_state_of_module(module), &err);
    Py_RETURN_NONE;
}

static PyObject *write_safetensors(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"path", "tensors", "dtypes", "metadata", NULL};
    PyObject *path, *tensors, *dtypes, *metadata = Py_None, *result = NULL;
    write_call call = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&OO|O:write_safetensors", keywords, PyUnicode_FSConverter, &path,
                                     &tensors, &dtypes, &metadata))
        return NULL;
    PyObject *tensors_copy = copy_of_mapping(tensors);
    PyObject *dtypes_copy = tensors_copy ? copy_of_mapping(dtypes) : NULL;
    PyObject *metadata_copy = dtypes_copy && metadata != Py_None ? copy_of_mapping(metadata) : NULL;
    if (dtypes_copy && (metadata_copy || metadata == Py_None) &&
        collect(&call, tensors_copy, dtypes_copy, metadata_copy) == 0)
        result = write_collected(module, PyBytes_AS_STRING(path), &call);
    b2_free(call.sources);
    b2_free(call.metadata);
    Py_XDECREF(call.keep);
    Py_XDECREF(metadata_copy);
    Py_XDECREF(dtypes_copy);
    Py_XDECREF(tensors_copy);
    Py_DECREF(path);
    return result;
}

static PyMethodDef functions[] = {
    {"parse_safetensors", parse_safetensors, METH_O,
     "parse_safetensors(data)\n\nChecks a whole safetensors file in memory; CheckpointError names the rule it breaks."},
    {"write_safetensors", (PyCFunction)(void (*)(void))write_safetensors, METH_VARARGS | METH_KEYWORDS,
     "write_safetensors(path, tensors, dtypes, metadata=None)\n\nWrites arrays by name, all or nothing: on OSError the old "
     "file is untouched.\ndtypes: safetensors dtypes by name where the array's own is not meant (\"BF16\" for uint16 bits)."},
    {"_check_json", check_json, METH_VARARGS,
     "_check_json(data, where)\n\nStrict JSON (RFC 8259), nested at most 100 deep; CheckpointError beginning with `where`."},
    {0},
};

int b2py_add_safetensors(PyObject *module)
{
    b2py_state *state = b2py_state_of_module(module);
    state->safetensors_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &file_spec, NULL);
    if (!state->safetensors_type || PyModule_AddType(module, state->safetensors_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
