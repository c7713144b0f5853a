/* See py_hooks.h. Every hook holds the GIL just for its call; a callable's exception stays set on the thread. */
#include "python/py_hooks.h"

#include <string.h>

#include "core/memory.h"
#include "generate/rules.h"
#include "generate/scores.h"
#include "python/py_search.h"

static PyObject *ids_array(const b2_view *view)
{
    npy_intp shape[2] = {view->rows, view->length};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_INT64);
    if (!array)
        return NULL;
    int64_t *to = PyArray_DATA((PyArrayObject *)array);
    for (int64_t i = 0; i < view->rows; i++)
        for (int64_t j = 0; j < view->length; j++)
            *to++ = view->ids[i * view->ld + j];
    return array;
}

static PyObject *scores_array(const float *scores, int64_t rows, int64_t vocabulary)
{
    npy_intp shape[2] = {rows, vocabulary};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_FLOAT32);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), scores, (size_t)(rows * vocabulary) * sizeof *scores);
    return array;
}

static PyArrayObject *answer_of(PyObject *answer, const char *name, int type, int ndim, int64_t rows, int64_t columns)
{
    PyArrayObject *array = answer ? b2py_array(answer, name, type, ndim) : NULL;
    Py_XDECREF(answer);
    if (array && (PyArray_DIM(array, 0) != rows || (ndim == 2 && PyArray_DIM(array, 1) != columns))) {
        PyErr_Format(PyExc_ValueError, "%s: expected %lld rows, found a shape of another size", name, (long long)rows);
        Py_CLEAR(array);
    }
    return array;
}

static int failed(b2_err *err, const char *name)
{
    return b2_fail(err, B2_E_CALLBACK, "%s raised", name);
}

static int process(b2_hooks *base, const b2_view *view, float *scores, b2_err *err)
{
    b2py_hooks *hooks = (b2py_hooks *)base;
    int64_t vocabulary = base->vocabulary;
    b2py_call_hold(hooks->call);
    PyObject *ids = ids_array(view), *before = ids ? scores_array(scores, view->rows, vocabulary) : NULL;
    PyObject *answer = before ? PyObject_CallFunctionObjArgs(hooks->process, ids, before, NULL) : NULL;
    PyArrayObject *after = answer_of(answer, "scores returned by process", NPY_FLOAT32, 2, view->rows, vocabulary);
    if (after)
        memcpy(scores, PyArray_DATA(after), (size_t)(view->rows * vocabulary) * sizeof *scores);
    int status = after ? 0 : failed(err, "process");
    Py_XDECREF(ids);
    Py_XDECREF(before);
    Py_XDECREF(after);
    b2py_call_resume(hooks->call);
    return status;
}

static int stop(b2_hooks *base, const b2_view *view, uint8_t *ends, b2_err *err)
{
    b2py_hooks *hooks = (b2py_hooks *)base;
    b2py_call_hold(hooks->call);
    PyObject *ids = ids_array(view);
    PyObject *answer = ids ? PyObject_CallOneArg(hooks->stop, ids) : NULL;
    PyArrayObject *flags = answer_of(answer, "flags returned by stop", NPY_BOOL, 1, view->rows, 0);
    for (int64_t i = 0; flags && i < view->rows; i++)
        if (((const npy_bool *)PyArray_DATA(flags))[i])
            ends[i] = 1;
    int status = flags ? 0 : failed(err, "stop");
    Py_XDECREF(ids);
    Py_XDECREF(flags);
    b2py_call_resume(hooks->call);
    return status;
}

static int tell(b2py_hooks *hooks, PyObject *function, PyObject *array, const char *name, b2_err *err)
{
    PyObject *answer = array ? PyObject_CallOneArg(function, array) : NULL;
    int status = answer ? 0 : failed(err, name);
    Py_XDECREF(array);
    Py_XDECREF(answer);
    b2py_call_resume(hooks->call);
    return status;
}

static int put(b2_hooks *base, int64_t n, const int32_t *tokens, b2_err *err)
{
    b2py_hooks *hooks = (b2py_hooks *)base;
    npy_intp shape = n;
    b2py_call_hold(hooks->call);
    PyObject *array = PyArray_SimpleNew(1, &shape, NPY_INT64);
    for (int64_t i = 0; array && i < n; i++)
        ((int64_t *)PyArray_DATA((PyArrayObject *)array))[i] = tokens[i];
    return tell(hooks, hooks->put, array, "put", err);
}

static int keep_logits(b2_hooks *base, int64_t n, const float *logits, b2_err *err)
{
    b2py_hooks *hooks = (b2py_hooks *)base;
    b2py_call_hold(hooks->call);
    return tell(hooks, hooks->logits, scores_array(logits, n, base->vocabulary), "logits", err);
}

static int keep_scores(b2_hooks *base, int64_t n, const float *scores, b2_err *err)
{
    b2py_hooks *hooks = (b2py_hooks *)base;
    b2py_call_hold(hooks->call);
    return tell(hooks, hooks->scores, scores_array(scores, n, base->vocabulary), "scores", err);
}

static int take_callables(b2py_hooks *hooks, PyObject *dict)
{
    struct {
        const char *name;
        PyObject **function;
    } known[] = {{"process", &hooks->process}, {"stop", &hooks->stop}, {"put", &hooks->put},
                 {"logits", &hooks->logits}, {"scores", &hooks->scores}};
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(dict, &position, &key, &value)) {
        size_t i = 0, count = sizeof known / sizeof *known;
        while (i < count && !(PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, known[i].name) == 0))
            i++;
        if (i == count || !PyCallable_Check(value)) {
            PyErr_Format(PyExc_TypeError, "hooks: %R is no known hook with a callable", key);
            return -1;
        }
        *known[i].function = Py_NewRef(value);
    }
    return 0;
}

int b2py_hooks_parse(b2py_hooks *hooks, PyObject *object, b2py_call *call, b2_generate_opts *opts)
{
    opts->hooks = NULL;
    if (object == Py_None)
        return 0;
    if (!PyDict_Check(object)) {
        PyErr_Format(PyExc_TypeError, "hooks: expected a dict or None, found %s", Py_TYPE(object)->tp_name);
        return -1;
    }
    if (take_callables(hooks, object) < 0)
        return -1;
    hooks->call = call;
    hooks->base.process = hooks->process ? process : NULL;
    hooks->base.stop = hooks->stop ? stop : NULL;
    hooks->base.put = hooks->put ? put : NULL;
    hooks->base.logits = hooks->logits ? keep_logits : NULL;
    hooks->base.scores = hooks->scores ? keep_scores : NULL;
    if (PyDict_GET_SIZE(object) > 0)
        opts->hooks = &hooks->base;
    return 0;
}

void b2py_hooks_release(b2py_hooks *hooks)
{
    Py_CLEAR(hooks->process);
    Py_CLEAR(hooks->stop);
    Py_CLEAR(hooks->put);
    Py_CLEAR(hooks->logits);
    Py_CLEAR(hooks->scores);
}

/* ---- apply_rules ---- */

/* By the options that they are. */
static const char *const RULE_NAMES[B2_RULES] = {
    [B2_RULE_SEQUENCE_BIAS] = "sequence_bias",
    [B2_RULE_REPETITION] = "repetition_penalty",
    [B2_RULE_NGRAMS] = "no_repeat_ngram_size",
    [B2_RULE_BAD_WORDS] = "bad_words_ids",
    [B2_RULE_MIN_LENGTH] = "min_length",
    [B2_RULE_MIN_NEW_TOKENS] = "min_new_tokens",
    [B2_RULE_PREFIX] = "prefix_allowed_tokens_fn",
    [B2_RULE_FORCED_BOS] = "forced_bos_token_id",
    [B2_RULE_FORCED_EOS] = "forced_eos_token_id",
    [B2_RULE_REMOVE_INVALID] = "remove_invalid_values",
    [B2_RULE_DECAY] = "exponential_decay_length_penalty",
    [B2_RULE_SUPPRESS] = "suppress_tokens",
    [B2_RULE_BEGIN_SUPPRESS] = "begin_suppress_tokens",
    [B2_RULE_CUSTOM] = "logits_processor",
    [B2_RULE_TEMPERATURE] = "temperature",
    [B2_RULE_TOP_H] = "top_h",
    [B2_RULE_TOP_K] = "top_k",
    [B2_RULE_TOP_P] = "top_p",
    [B2_RULE_MIN_P] = "min_p",
    [B2_RULE_TYPICAL] = "typical_p",
    [B2_RULE_EPSILON] = "epsilon_cutoff",
    [B2_RULE_ETA] = "eta_cutoff",
    [B2_RULE_RENORMALIZE] = "renormalize_logits",
};

typedef struct rows_in {
    PyArrayObject *scores; /* float32 [n, V], a copy that becomes the result */
    PyArrayObject *ids;    /* int32 [n, t] */
    PyArrayObject *skip;   /* int64 [n] or NULL */
    int64_t prompt_length;
} rows_in;

static int check_rows(const rows_in *in)
{
    npy_intp rows = PyArray_DIM(in->scores, 0);
    if (PyArray_DIM(in->ids, 0) != rows || (in->skip && PyArray_DIM(in->skip, 0) != rows)) {
        PyErr_Format(PyExc_ValueError, "ids, skip: expected %zd rows, as many as scores has", rows);
        return -1;
    }
    if (PyArray_DIM(in->scores, 1) < 1 || PyArray_DIM(in->scores, 1) > INT32_MAX || in->prompt_length < 0 ||
        in->prompt_length > PyArray_DIM(in->ids, 1)) {
        PyErr_SetString(PyExc_ValueError, "scores: expected at least one column; prompt_length: from 0 to the ids' length");
        return -1;
    }
    for (npy_intp i = 0; in->skip && i < rows; i++) {
        int64_t skip = ((const int64_t *)PyArray_DATA(in->skip))[i];
        if (skip < 0 || skip > in->prompt_length) {
            PyErr_Format(PyExc_ValueError, "skip: row %zd: expected 0 to prompt_length", i);
            return -1;
        }
    }
    return 0;
}

/* Warpers sort, and no order has a place for NaN. Without them the search judges what comes out. */
static int check_scores(const rows_in *in, const b2_generate_opts *opts, b2_rule first, b2_rule end, b2_err *err)
{
    int removes = opts->remove_invalid_values && first <= B2_RULE_REMOVE_INVALID && end > B2_RULE_REMOVE_INVALID;
    int64_t count = (int64_t)PyArray_SIZE(in->scores);
    if (opts->do_sample && end > B2_RULE_CUSTOM && !removes && b2_scores_broken(PyArray_DATA(in->scores), count))
        return b2_fail(err, B2_E_NUMERIC, "scores: NaN or Inf");
    return 0;
}

static int apply_range(const rows_in *in, const b2_generate_opts *opts, b2_rule first, b2_rule end, b2_err *err)
{
    int64_t vocabulary = PyArray_DIM(in->scores, 1), length = PyArray_DIM(in->ids, 1);
    if (b2_rules_check(opts, vocabulary, err) < 0 || check_scores(in, opts, first, end, err) < 0)
        return -1;
    void *scratch = b2_alloc(1, (size_t)b2_rules_scratch(opts, vocabulary, length), "rules", err);
    if (!scratch)
        return -1;
    b2py_call call;
    b2py_call_begin(&call);
    for (npy_intp i = 0; i < PyArray_DIM(in->scores, 0); i++) {
        const int32_t *ids = (const int32_t *)PyArray_DATA(in->ids) + i * length;
        b2_history history = {.prompt = ids, .prompt_length = in->prompt_length,
                              .skip = in->skip ? ((const int64_t *)PyArray_DATA(in->skip))[i] : 0,
                              .made = ids + in->prompt_length, .made_length = length - in->prompt_length};
        b2_rules_apply_range((float *)PyArray_DATA(in->scores) + i * vocabulary, vocabulary, &history, opts, first, end,
                             scratch);
    }
    b2py_call_end(&call);
    b2_free(scratch);
    return 0;
}

static int read_rows(rows_in *in, PyObject *scores, PyObject *ids, PyObject *skip)
{
    PyArrayObject *given = b2py_array(scores, "scores", NPY_FLOAT32, 2);
    in->scores = given ? (PyArrayObject *)PyArray_NewCopy(given, NPY_CORDER) : NULL;
    Py_XDECREF(given);
    if (!in->scores || !(in->ids = b2py_array(ids, "ids", NPY_INT32, 2)))
        return -1;
    if (skip != Py_None && !(in->skip = b2py_array(skip, "skip", NPY_INT64, 1)))
        return -1;
    return check_rows(in);
}

static int rule_named(const char *name, b2_rule *out)
{
    for (int rule = 0; rule < B2_RULES; rule++)
        if (strcmp(RULE_NAMES[rule], name) == 0) {
            *out = (b2_rule)rule;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "no rule is named '%s'", name);
    return -1;
}

static PyObject *apply_rules(PyObject *module, PyObject *arguments)
{
    PyObject *scores, *ids, *skip, *options;
    const char *first_name, *end_name;
    b2_rule first, end = B2_RULES;
    rows_in in = {0};
    if (!PyArg_ParseTuple(arguments, "OOLOOsz:apply_rules", &scores, &ids, &in.prompt_length, &skip, &options,
                          &first_name, &end_name) ||
        rule_named(first_name, &first) < 0 || (end_name && rule_named(end_name, &end) < 0))
        return NULL;
    PyObject *result = NULL;
    if (read_rows(&in, scores, ids, skip) == 0) {
        b2_generate_opts opts;
        b2py_options_storage storage;
        b2_err err = {0};
        if (b2py_parse_options(options, &opts, &storage, &err) < 0 || apply_range(&in, &opts, first, end, &err) < 0)
            b2py_raise(b2py_state_of_module(module), &err);
        else
            result = Py_NewRef(in.scores);
        b2py_options_release(&storage);
    }
    Py_XDECREF(in.scores);
    Py_XDECREF(in.ids);
    Py_XDECREF(in.skip);
    return result;
}

static PyMethodDef rule_methods[] = {
    {"apply_rules", apply_rules, METH_VARARGS,
     "apply_rules(scores, ids, prompt_length, skip, options, first, end, /) -> scores\n\n"
     "The rules from `first` to before `end` (None: to the last) on scores float32 [n, V], a copy of which comes back;\n"
     "ids int32 [n, t], skip int64 [n] or None. Rules go by the names in RULES."},
    {0},
};

static PyObject *rule_names(void)
{
    PyObject *names = PyTuple_New(B2_RULES);
    for (int rule = 0; names && rule < B2_RULES; rule++) {
        PyObject *name = PyUnicode_FromString(RULE_NAMES[rule]);
        if (!name)
            Py_CLEAR(names);
        else
            PyTuple_SET_ITEM(names, rule, name);
    }
    return names;
}

int b2py_add_rules(PyObject *module)
{
    PyObject *names = rule_names();
    int status = names ? PyModule_AddObjectRef(module, "RULES", names) : -1;
    Py_XDECREF(names);
    return status < 0 ? -1 : PyModule_AddFunctions(module, rule_methods);
}
