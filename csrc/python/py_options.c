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

static int measure_words(PyObject *words, const char *name, int64_t *offsets, b2_err *err)
{
    offsets[0] = 0;
    for (Py_ssize_t w = 0; w < PyTuple_GET_SIZE(words); w++) {
        PyObject *ids = as_items(PyTuple_GET_ITEM(words, w), name, err);
        if (!ids)
            return -1;
        offsets[w + 1] = offsets[w] + PyTuple_GET_SIZE(ids);
        Py_DECREF(ids);
    }
    return 0;
}

static int fill_words(PyObject *words, const char *name, int32_t *out, const int64_t *offsets, b2_err *err)
{
    for (Py_ssize_t w = 0; w < PyTuple_GET_SIZE(words); w++) {
        PyObject *ids = as_items(PyTuple_GET_ITEM(words, w), name, err);
        if (!ids)
            return -1;
        /* A sequence may answer differently the second time. */
        int same = PyTuple_GET_SIZE(ids) == offsets[w + 1] - offsets[w];
        int status = same ? fill_ids(out + offsets[w], ids, name, err)
                          : b2_fail(err, B2_E_VALUE, "%s: changed while being read", name);
        Py_DECREF(ids);
        if (status < 0)
            return -1;
    }
    return 0;
}

static int parse_words(PyObject *words, const char *name, b2py_words *out, b2_err *err)
{
    out->count = PyTuple_GET_SIZE(words);
    out->offsets = b2_alloc((size_t)out->count + 1, sizeof *out->offsets, name, err);
    if (!out->offsets || measure_words(words, name, out->offsets, err) < 0)
        return -1;
    out->ids = b2_alloc((size_t)out->offsets[out->count], sizeof *out->ids, name, err);
    return out->ids ? fill_words(words, name, out->ids, out->offsets, err) : -1;
}

static int get_words(PyObject *options, const char *name, b2py_words *out, b2_err *err)
{
    PyObject *value = option(options, name, err);
    PyObject *words = value ? as_items(value, name, err) : NULL;
    if (!words)
        return -1;
    int status = parse_words(words, name, out, err);
    Py_DECREF(words);
    return status;
}

static int has(PyObject *options, const char *name)
{
    return PyDict_GetItemString(options, name) != NULL;
}

static const char *const KNOWN[] = {
    "max_length",     "max_new_tokens",     "min_length",           "min_new_tokens",   "num_beams",
    "length_penalty", "repetition_penalty", "num_return_sequences", "early_stopping",   "no_repeat_ngram_size",
    "eos_ids",        "pad_id",             "bad_words",            "suppress_ids",     "begin_suppress_ids",
    "biased",         "biases",             "forced_bos_ids",       "forced_eos_ids",   "remove_invalid_values",
    "decay_start",    "decay_factor",       "renormalize_logits",   "do_sample",        "seed",
    "temperature",    "top_h",              "top_k",                "top_p",            "min_p",
    "typical_p",      "epsilon_cutoff",     "eta_cutoff",
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
        get_ids(options, "suppress_ids", &storage->suppress_ids, &opts->suppress_count, err) < 0 ||
        get_words(options, "bad_words", &storage->bad_words, err) < 0)
        return -1;
    opts->repetition_penalty = (float)penalty;
    opts->eos_ids = storage->eos_ids;
    opts->suppress_ids = storage->suppress_ids;
    opts->bad_words = storage->bad_words.ids;
    opts->bad_word_offsets = storage->bad_words.offsets;
    opts->bad_word_count = storage->bad_words.count;
    return 0;
}

static int fill_biases(PyObject *biases, b2py_options_storage *storage, b2_err *err)
{
    if (PyTuple_GET_SIZE(biases) != storage->biased.count)
        return b2_fail(err, B2_E_VALUE, "biases: expected %lld, found %lld", (long long)storage->biased.count,
                       (long long)PyTuple_GET_SIZE(biases));
    storage->biases = b2_alloc((size_t)storage->biased.count, sizeof *storage->biases, "biases", err);
    if (!storage->biases)
        return -1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(biases); i++) {
        storage->biases[i] = (float)PyFloat_AsDouble(PyTuple_GET_ITEM(biases, i));
        if (PyErr_Occurred())
            return wrong("biases", "numbers", PyTuple_GET_ITEM(biases, i), err);
    }
    return 0;
}

static int parse_biases(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    if (!has(options, "biased"))
        return 0;
    PyObject *value = get_words(options, "biased", &storage->biased, err) < 0 ? NULL : option(options, "biases", err);
    PyObject *biases = value ? as_items(value, "biases", err) : NULL;
    if (!biases)
        return -1;
    int status = fill_biases(biases, storage, err);
    Py_DECREF(biases);
    opts->biased = storage->biased.ids;
    opts->biased_offsets = storage->biased.offsets;
    opts->biased_count = storage->biased.count;
    opts->biases = storage->biases;
    return status;
}

/* What may be left out, and then is off. */
static int get_flag(PyObject *options, const char *name, int *out, b2_err *err)
{
    PyObject *value = has(options, name) ? option(options, name, err) : Py_False;
    if (!PyBool_Check(value))
        return wrong(name, "True or False", value, err);
    *out = value == Py_True;
    return 0;
}

static int get_more_ids(PyObject *options, const char *name, int32_t **ids, int64_t *count, b2_err *err)
{
    return has(options, name) ? get_ids(options, name, ids, count, err) : 0;
}

static int parse_further_rules(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    if (get_more_ids(options, "begin_suppress_ids", &storage->begin_suppress_ids, &opts->begin_suppress_count, err) < 0 ||
        get_more_ids(options, "forced_bos_ids", &storage->forced_bos_ids, &opts->forced_bos_count, err) < 0 ||
        get_more_ids(options, "forced_eos_ids", &storage->forced_eos_ids, &opts->forced_eos_count, err) < 0 ||
        get_flag(options, "remove_invalid_values", &opts->remove_invalid_values, err) < 0 ||
        get_flag(options, "renormalize_logits", &opts->renormalize_logits, err) < 0)
        return -1;
    opts->begin_suppress_ids = storage->begin_suppress_ids;
    opts->forced_bos_ids = storage->forced_bos_ids;
    opts->forced_eos_ids = storage->forced_eos_ids;
    opts->decays = has(options, "decay_factor");
    if (opts->decays && (get_double(options, "decay_factor", &opts->decay_factor, err) < 0 ||
                         get_int(options, "decay_start", INT32_MIN, INT32_MAX, &opts->decay_start, err) < 0))
        return -1;
    return parse_biases(options, opts, storage, err);
}

static int get_seed(PyObject *options, uint64_t *out, b2_err *err)
{
    PyObject *value = option(options, "seed", err);
    if (!value)
        return -1;
    *out = PyLong_Check(value) ? PyLong_AsUnsignedLongLong(value) : 0;
    return !PyLong_Check(value) || PyErr_Occurred() ? wrong("seed", "an integer from 0 to 2**64 - 1", value, err) : 0;
}

static int parse_sampling(PyObject *options, b2_generate_opts *opts, b2_err *err)
{
    if (get_flag(options, "do_sample", &opts->do_sample, err) < 0)
        return -1;
    if (!opts->do_sample)
        return 0;
    return get_seed(options, &opts->seed, err) < 0 ||
                   get_double(options, "temperature", &opts->temperature, err) < 0 ||
                   get_double(options, "top_h", &opts->top_h, err) < 0 ||
                   get_int(options, "top_k", 0, INT64_MAX, &opts->top_k, err) < 0 ||
                   get_double(options, "top_p", &opts->top_p, err) < 0 ||
                   get_double(options, "min_p", &opts->min_p, err) < 0 ||
                   get_double(options, "typical_p", &opts->typical_p, err) < 0 ||
                   get_double(options, "epsilon_cutoff", &opts->epsilon_cutoff, err) < 0 ||
                   get_double(options, "eta_cutoff", &opts->eta_cutoff, err) < 0
               ? -1
               : 0;
}

static int parse(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err)
{
    return check_names(options, err) < 0 || parse_lengths(options, opts, err) < 0 ||
                   parse_beams(options, opts, err) < 0 || parse_rules(options, opts, storage, err) < 0 ||
                   parse_further_rules(options, opts, storage, err) < 0 || parse_sampling(options, opts, err) < 0
               ? -1
               : 0;
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
    int status = parse(copy, opts, storage, err);
    Py_DECREF(copy);
    return status;
}

void b2py_options_release(b2py_options_storage *storage)
{
    b2_free(storage->eos_ids);
    b2_free(storage->suppress_ids);
    b2_free(storage->begin_suppress_ids);
    b2_free(storage->forced_bos_ids);
    b2_free(storage->forced_eos_ids);
    b2_free(storage->bad_words.ids);
    b2_free(storage->bad_words.offsets);
    b2_free(storage->biased.ids);
    b2_free(storage->biased.offsets);
    b2_free(storage->biases);
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

static PyObject *copy_of(const void *data, int ndim, npy_intp *shape, int type)
{
    PyObject *array = PyArray_SimpleNew(ndim, shape, type);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), data, (size_t)PyArray_NBYTES((PyArrayObject *)array));
    return array;
}

PyObject *b2py_generated_dict(const b2_generated *generated)
{
    npy_intp rows = generated->rows, shape[2] = {rows, generated->max_new};
    PyObject *ids = ids_array(generated);
    PyObject *lengths = copy_of(generated->lengths, 1, &rows, NPY_INT64);
    PyObject *scores = copy_of(generated->scores, 1, &rows, NPY_FLOAT32);
    PyObject *beams = generated->beam_rows ? copy_of(generated->beam_rows, 2, shape, NPY_INT32) : Py_NewRef(Py_None);
    if (ids && lengths && scores && beams)
        return Py_BuildValue("{s:N,s:N,s:N,s:N,s:L}", "ids", ids, "lengths", lengths, "scores", scores, "beam_indices",
                             beams, "steps", (long long)generated->stats.steps);
    Py_XDECREF(ids);
    Py_XDECREF(lengths);
    Py_XDECREF(scores);
    Py_XDECREF(beams);
    return NULL;
}
