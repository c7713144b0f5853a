/* Options of a search from a Python dict, and its result as one. */
#include "python/py_search.h"

#include <string.h>

#include "core/memory.h"

/* One look-up; the reference is borrowed. */
static PyObject *option(PyObject *options, const char *name, b2_err *err)
{
    PyObject *value = PyDict_GetItemString(options, name);
    if (!value)
        b2_fail(err, B2_E_VALUE, "options: '%s' is missing", name);
    return value;
}

/* Python's own complaint becomes ours, with the option's name. */
static int wrong(const char *name, const char *expected, PyObject *found, b2_err *err)
{
    PyErr_Clear();
    return b2_fail(err, B2_E_TYPE, "%s: expected %s, found %s", name, expected, Py_TYPE(found)->tp_name);
}

static int to_int64(PyObject *value, const char *name, int64_t low, int64_t high, int64_t *out, b2_err *err)
{
    int overflow = 0;
    if (PyBool_Check(value) || !PyIndex_Check(value))
        return wrong(name, "an integer", value, err);
    PyObject *number = PyNumber_Index(value);
    long long parsed = number ? PyLong_AsLongLongAndOverflow(number, &overflow) : 0;
    Py_XDECREF(number);
    if (PyErr_Occurred())
        return wrong(name, "an integer", value, err);
    if (overflow || parsed < low || parsed > high)
        return b2_fail(err, B2_E_VALUE, "%s: expected an integer from %lld to %lld", name, (long long)low,
                       (long long)high);
    *out = parsed;
    return 0;
}

static int get_int(PyObject *options, const char *name, int64_t low, int64_t high, int64_t *out, b2_err *err)
{
    PyObject *value = option(options, name, err);
    return value ? to_int64(value, name, low, high, out, err) : -1;
}

/* None: -1, which stands for "unset". */
static int get_length(PyObject *options, const char *name, int64_t *out, b2_err *err)
{
    *out = -1;
    PyObject *value = option(options, name, err);
    if (!value || value == Py_None)
        return value ? 0 : -1;
    return to_int64(value, name, 0, INT64_MAX, out, err);
}

static int get_int32(PyObject *options, const char *name, int32_t *out, b2_err *err)
{
    int64_t value = 0;
    if (get_int(options, name, INT32_MIN, INT32_MAX, &value, err) < 0)
        return -1;
    *out = (int32_t)value;
    return 0;
}

static int get_double(PyObject *options, const char *name, double *out, b2_err *err)
{
    PyObject *value = option(options, name, err);
    if (!value)
        return -1;
    *out = PyFloat_AsDouble(value);
    return PyErr_Occurred() ? wrong(name, "a number", value, err) : 0;
}

static int get_early_stopping(PyObject *options, b2_early_stopping *out, b2_err *err)
{
    PyObject *value = option(options, "early_stopping", err);
    if (!value)
        return -1;
    if (value == Py_True)
        *out = B2_EARLY_STOPPING_TRUE;
    else if (value == Py_False)
        *out = B2_EARLY_STOPPING_FALSE;
    else if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, "never") == 0)
        *out = B2_EARLY_STOPPING_NEVER;
    else
        return b2_fail(err, B2_E_VALUE, "early_stopping: expected True, False or 'never'");
    return 0;
}

/* `sequence` as a tuple, which the __index__ of an item cannot change; a new reference. */
static PyObject *as_items(PyObject *sequence, const char *name, b2_err *err)
{
    PyObject *items = PyUnicode_Check(sequence) ? NULL : PySequence_Tuple(sequence);
    if (!items)
        wrong(name, "a sequence", sequence, err);
    return items;
}

static int fill_ids(int32_t *ids, PyObject *items, const char *name, b2_err *err)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items); i++) {
        int64_t id = 0;
        if (to_int64(PyTuple_GET_ITEM(items, i), name, INT32_MIN, INT32_MAX, &id, err) < 0)
            return -1;
        ids[i] = (int32_t)id;
    }
    return 0;
}

static int get_ids(PyObject *options, const char *name, int32_t **ids, int64_t *count, b2_err *err)
{
    PyObject *value = option(options, name, err);
    PyObject *items = value ? as_items(value, name, err) : NULL;
    if (!items)
        return -1;
    *count = PyTuple_GET_SIZE(items);
    *ids = b2_alloc((size_t)*count, sizeof **ids, name, err);
    int status = *ids ? fill_ids(*ids, items, name, err) : -1;
    Py_DECREF(items);
    return status;
}

static int measure_words(PyObject *words, int64_t *offsets, b2_err *err)
{
    offsets[0] = 0;
    for (Py_ssize_t w = 0; w < PyTuple_GET_SIZE(words); w++) {
        PyObject *ids = as_items(PyTuple_GET_ITEM(words, w), "bad_words", err);
        if (!ids)
            return -1;
        offsets[w + 1] = offsets[w] + PyTuple_GET_SIZE(ids);
        Py_DECREF(ids);
    }
    return 0;
}

static int fill_words(PyObject *words, int32_t *out, const int64_t *offsets, b2_err *err)
{
    for (Py_ssize_t w = 0; w < PyTuple_GET_SIZE(words); w++) {
        PyObject *ids = as_items(PyTuple_GET_ITEM(words, w), "bad_words", err);
        if (!ids)
            return -1;
        /* A sequence may answer differently the second time. */
        int same = PyTuple_GET_SIZE(ids) == offsets[w + 1] - offsets[w];
        int status = same ? fill_ids(out + offsets[w], ids, "bad_words", err)
                          : b2_fail(err, B2_E_VALUE, "bad_words: changed while being read");
        Py_DECREF(ids);
        if (status < 0)
            return -1;
    }
    return 0;
}

static int parse_words(PyObject *words, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    opts->bad_word_count = PyTuple_GET_SIZE(words);
    storage->bad_word_offsets =
        b2_alloc((size_t)opts->bad_word_count + 1, sizeof *storage->bad_word_offsets, "bad_words", err);
    if (!storage->bad_word_offsets || measure_words(words, storage->bad_word_offsets, err) < 0)
        return -1;
    size_t ids = (size_t)storage->bad_word_offsets[opts->bad_word_count];
    storage->bad_words = b2_alloc(ids, sizeof *storage->bad_words, "bad_words", err);
    if (!storage->bad_words || fill_words(words, storage->bad_words, storage->bad_word_offsets, err) < 0)
        return -1;
    opts->bad_words = storage->bad_words;
    opts->bad_word_offsets = storage->bad_word_offsets;
    return 0;
}

static int get_words(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    PyObject *value = option(options, "bad_words", err);
    PyObject *words = value ? as_items(value, "bad_words", err) : NULL;
    if (!words)
        return -1;
    int status = parse_words(words, opts, storage, err);
    Py_DECREF(words);
    return status;
}

static const char *const KNOWN[] = {
    "max_length",     "max_new_tokens",     "min_length",           "min_new_tokens", "num_beams",
    "length_penalty", "repetition_penalty", "num_return_sequences", "early_stopping", "no_repeat_ngram_size",
    "eos_ids",        "pad_id",             "bad_words",            "suppress_ids",
};

static int check_names(PyObject *options, b2_err *err)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(options, &position, &key, &value)) {
        size_t i = 0, count = sizeof KNOWN / sizeof *KNOWN;
        while (i < count && !(PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, KNOWN[i]) == 0))
            i++;
        const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : NULL;
        PyErr_Clear();
        if (i == count)
            return b2_fail(err, B2_E_VALUE, "options: unknown option '%s'", name ? name : "?");
    }
    return 0;
}

static int parse_lengths(PyObject *options, b2_generate_opts *opts, b2_err *err)
{
    if (get_length(options, "max_length", &opts->max_length, err) < 0 ||
        get_length(options, "max_new_tokens", &opts->max_new_tokens, err) < 0 ||
        get_int(options, "min_length", 0, INT64_MAX, &opts->min_length, err) < 0)
        return -1;
    return get_length(options, "min_new_tokens", &opts->min_new_tokens, err);
}

static int parse_beams(PyObject *options, b2_generate_opts *opts, b2_err *err)
{
    if (get_int32(options, "num_beams", &opts->num_beams, err) < 0 ||
        get_int32(options, "num_return_sequences", &opts->num_return_sequences, err) < 0 ||
        get_double(options, "length_penalty", &opts->length_penalty, err) < 0)
        return -1;
    return get_early_stopping(options, &opts->early_stopping, err);
}

static int parse_rules(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    double penalty;
    if (get_double(options, "repetition_penalty", &penalty, err) < 0 ||
        get_int32(options, "no_repeat_ngram_size", &opts->no_repeat_ngram_size, err) < 0 ||
        get_int32(options, "pad_id", &opts->pad_id, err) < 0 ||
        get_ids(options, "eos_ids", &storage->eos_ids, &opts->eos_count, err) < 0 ||
        get_ids(options, "suppress_ids", &storage->suppress_ids, &opts->suppress_count, err) < 0)
        return -1;
    opts->repetition_penalty = (float)penalty;
    opts->eos_ids = storage->eos_ids;
    opts->suppress_ids = storage->suppress_ids;
    return get_words(options, opts, storage, err);
}

int b2py_parse_options(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    *opts = (b2_generate_opts){0};
    *storage = (b2py_options_storage){0};
    if (!PyDict_Check(options))
        return b2_fail(err, B2_E_TYPE, "options: expected a dict, found %s", Py_TYPE(options)->tp_name);
    PyObject *copy = PyDict_Copy(options); /* references are borrowed from it while __index__ and __float__ run */
    if (!copy)
        return b2_fail(err, B2_E_CALLBACK, "options");
    int status = check_names(copy, err) < 0 || parse_lengths(copy, opts, err) < 0 || parse_beams(copy, opts, err) < 0
                     ? -1
                     : parse_rules(copy, opts, storage, err);
    Py_DECREF(copy);
    return status;
}

void b2py_options_release(b2py_options_storage *storage)
{
    b2_free(storage->eos_ids);
    b2_free(storage->bad_words);
    b2_free(storage->bad_word_offsets);
    b2_free(storage->suppress_ids);
    *storage = (b2py_options_storage){0};
}

static PyObject *ids_array(const b2_generated *generated)
{
    npy_intp shape[2] = {generated->rows, generated->max_new};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_INT64);
    if (!array)
        return NULL;
    int64_t *ids = PyArray_DATA((PyArrayObject *)array);
    for (int64_t i = 0; i < generated->rows * generated->max_new; i++)
        ids[i] = generated->ids[i];
    return array;
}

static PyObject *vector(const void *data, npy_intp count, int type, size_t size)
{
    PyObject *array = PyArray_SimpleNew(1, &count, type);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), data, (size_t)count * size);
    return array;
}

PyObject *b2py_generated_dict(const b2_generated *generated)
{
    PyObject *ids = ids_array(generated);
    PyObject *lengths = vector(generated->lengths, generated->rows, NPY_INT64, sizeof(int64_t));
    PyObject *scores = vector(generated->scores, generated->rows, NPY_FLOAT32, sizeof(float));
    if (ids && lengths && scores)
        return Py_BuildValue("{s:N,s:N,s:N,s:L}", "ids", ids, "lengths", lengths, "scores", scores, "steps",
                             (long long)generated->steps);
    Py_XDECREF(ids);
    Py_XDECREF(lengths);
    Py_XDECREF(scores);
    return NULL;
}
