/* Greedy and beam search over a step function written in Python, for lessons and tests. The function has no memory:
 * it is given whole sequences and returns the logits of what comes next. */
#include "python/py_search.h"

#include <string.h>

#include "core/memory.h"
#include "python/py_hooks.h"

/* The b2_step that calls back. Owns `rows`; the rest belongs to run_search. */
typedef struct python_step {
    b2_step base;
    b2py_call *call;
    PyObject *function;
    int stacked;            /* 1: one [n, t] array; 0: a list of n arrays */
    PyArrayObject *first;   /* [B, V] logits of the prompts, asked for before the search to learn V */
    const b2_prompts *prompts;
    int64_t capacity;       /* ids a row may come to hold */
    int64_t *rows[2];       /* [B*W, capacity] what each running row has said; now and next */
    int64_t *lengths[2];    /* [B*W] */
    int64_t row_count;
    int64_t rows_per_item;  /* W */
    int now;
} python_step;

static PyObject *row_array(const int64_t *ids, int64_t length)
{
    npy_intp shape = length;
    PyObject *array = PyArray_SimpleNew(1, &shape, NPY_INT64);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), ids, (size_t)length * sizeof *ids);
    return array;
}

static PyObject *row_list(const python_step *s, int64_t n, const int32_t *row)
{
    PyObject *list = PyList_New(n);
    for (int64_t i = 0; list && i < n; i++) {
        PyObject *array = row_array(s->rows[s->now] + row[i] * s->capacity, s->lengths[s->now][row[i]]);
        if (!array)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, array);
    }
    return list;
}

static PyObject *row_stack(const python_step *s, int64_t n, const int32_t *row)
{
    npy_intp shape[2] = {n, s->lengths[s->now][row[0]]};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_INT64);
    if (!array)
        return NULL;
    int64_t *to = PyArray_DATA((PyArrayObject *)array);
    for (int64_t i = 0; i < n; i++)
        memcpy(to + i * shape[1], s->rows[s->now] + row[i] * s->capacity, (size_t)shape[1] * sizeof *to);
    return array;
}

/* Logits [n, V] of the given rows as an array that the caller owns; V < 0: whatever the function says. */
static PyArrayObject *ask(const python_step *s, int64_t n, const int32_t *row, int64_t vocabulary)
{
    PyObject *sequences = s->stacked ? row_stack(s, n, row) : row_list(s, n, row);
    PyObject *answer = sequences ? PyObject_CallOneArg(s->function, sequences) : NULL;
    Py_XDECREF(sequences);
    PyArrayObject *logits = answer ? b2py_array(answer, "logits returned by step", NPY_FLOAT32, 2) : NULL;
    Py_XDECREF(answer);
    if (!logits)
        return NULL;
    npy_intp rows = PyArray_DIM(logits, 0), columns = PyArray_DIM(logits, 1);
    if (rows == n && columns > 0 && (vocabulary < 0 || columns == vocabulary))
        return logits;
    if (vocabulary < 0)
        PyErr_Format(PyExc_ValueError, "logits returned by step: expected shape [%lld, V], found [%zd, %zd]",
                     (long long)n, rows, columns);
    else
        PyErr_Format(PyExc_ValueError, "logits returned by step: expected shape [%lld, %lld], found [%zd, %zd]",
                     (long long)n, (long long)vocabulary, rows, columns);
    Py_DECREF(logits);
    return NULL;
}

/* Each prompt has the place of its number: there are as many. */
static int prefill(b2_step *step, int64_t n, const int32_t *places, const b2_item *items, float *logits, b2_err *err)
{
    (void)places, (void)err;
    python_step *s = (python_step *)step;
    const float *first = PyArray_DATA(s->first);
    for (int64_t i = 0; i < n; i++)
        memcpy(logits + i * step->vocabulary, first + items[i].index * step->vocabulary,
               (size_t)step->vocabulary * sizeof *logits);
    return 0;
}

static void leave(b2_step *step, int32_t place)
{
    (void)step, (void)place;
}

static void say(python_step *s, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token)
{
    int64_t *const *rows = s->rows, *const *lengths = s->lengths;
    int now = s->now, next = !now;
    for (int64_t i = 0; i < n; i++) {
        int64_t length = lengths[now][parent[i]];
        int64_t *to = rows[next] + row[i] * s->capacity;
        memcpy(to, rows[now] + parent[i] * s->capacity, (size_t)length * sizeof *to);
        to[length] = token[i];
        lengths[next][row[i]] = length + 1;
    }
    s->now = next;
}

static int advance(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                   float *logits, b2_err *err)
{
    python_step *s = (python_step *)step;
    say(s, n, row, parent, token);
    b2py_call_hold(s->call);
    PyArrayObject *answer = ask(s, n, row, step->vocabulary);
    if (answer)
        memcpy(logits, PyArray_DATA(answer), (size_t)(n * step->vocabulary) * sizeof *logits);
    int failed = !answer;
    Py_XDECREF(answer);
    b2py_call_resume(s->call);
    return failed ? b2_fail(err, B2_E_CALLBACK, "step raised") : 0;
}

static int64_t capacity_of(const b2_prompts *prompts, const b2_generate_opts *opts)
{
    int64_t longest = 0;
    for (int64_t b = 0; b < prompts->rows; b++) {
        int64_t length = prompts->offsets[b + 1] - prompts->offsets[b];
        longest = length > longest ? length : longest;
    }
    int64_t bound = opts->max_new_tokens >= 0 && opts->max_new_tokens < INT64_MAX - longest
                        ? longest + opts->max_new_tokens : INT64_MAX;
    int64_t capacity = opts->max_length >= 0 && opts->max_length < bound ? opts->max_length : bound;
    /* b2_generate refuses unset and too small bounds, and names them. */
    return capacity > longest && capacity < INT64_MAX ? capacity : longest + 1;
}

static int reserve_rows(python_step *s, const b2_generate_opts *opts, b2_err *err)
{
    s->rows_per_item = b2_generate_rows_per_item(opts);
    s->row_count = s->prompts->rows * s->rows_per_item;
    s->capacity = capacity_of(s->prompts, opts);
    for (int i = 0; i < 2; i++) {
        if ((uint64_t)s->capacity > SIZE_MAX / sizeof(int64_t))
            return b2_fail(err, B2_E_MEMORY, "max_new_tokens: %lld tokens overflow the address space",
                           (long long)s->capacity);
        s->rows[i] = b2_alloc((size_t)s->row_count, (size_t)s->capacity * sizeof(int64_t), "sequences", err);
        s->lengths[i] = b2_alloc((size_t)s->row_count, sizeof(int64_t), "sequence lengths", err);
        if (!s->rows[i] || !s->lengths[i])
            return -1;
    }
    for (int64_t r = 0; r < s->row_count; r++) {
        const b2_prompts *prompts = s->prompts;
        int64_t b = r / s->rows_per_item, length = prompts->offsets[b + 1] - prompts->offsets[b];
        for (int64_t i = 0; i < length; i++)
            s->rows[0][r * s->capacity + i] = prompts->ids[prompts->offsets[b] + i];
        s->lengths[0][r] = length;
    }
    return 0;
}

static void release_rows(python_step *s)
{
    for (int i = 0; i < 2; i++) {
        b2_free(s->rows[i]);
        b2_free(s->lengths[i]);
    }
    Py_CLEAR(s->first);
}

/* The first question is asked before the search, because its answer says how large the vocabulary is. */
static int ask_first(python_step *s, b2_err *err)
{
    int32_t *row = b2_alloc((size_t)s->prompts->rows, sizeof *row, "prompt rows", err);
    if (!row)
        return -1;
    for (int64_t b = 0; b < s->prompts->rows; b++)
        row[b] = (int32_t)(b * s->rows_per_item);
    s->first = ask(s, s->prompts->rows, row, -1);
    b2_free(row);
    if (!s->first)
        return b2_fail(err, B2_E_CALLBACK, "step raised");
    s->base.vocabulary = PyArray_DIM(s->first, 1);
    return 0;
}

/* As much as memory for the rows hangs on; the rest is judged once the vocabulary is known. */
static int check_rows(const b2_generate_opts *opts, b2_err *err)
{
    if (opts->num_beams < 1 || opts->num_return_sequences < 1)
        return b2_fail(err, B2_E_VALUE, "%s: expected at least 1, found %d",
                       opts->num_beams < 1 ? "num_beams" : "num_return_sequences",
                       opts->num_beams < 1 ? opts->num_beams : opts->num_return_sequences);
    return 0;
}

static int run_search(b2py_state *state, python_step *s, const b2_generate_opts *opts, b2_generated *out, b2_err *err)
{
    if (check_rows(opts, err) < 0 || reserve_rows(s, opts, err) < 0 || ask_first(s, err) < 0)
        return -1;
    b2_search_size size = b2_generate_size(s->prompts, opts, 0);
    b2_cancel *cancel = b2py_call_begin(s->call);
    int status = b2_generate(out, s->prompts, &size, opts, &s->base, NULL, state->pool, cancel, err);
    b2py_call_end(s->call);
    return status;
}

static int read_prompts(PyObject *ids, PyObject *offsets, b2_prompts *prompts, PyArrayObject *held[2])
{
    held[0] = b2py_array(ids, "ids", NPY_INT32, 1);
    held[1] = b2py_array(offsets, "offsets", NPY_INT64, 1);
    if (!held[0] || !held[1])
        return -1;
    npy_intp count = PyArray_DIM(held[0], 0), rows = PyArray_DIM(held[1], 0) - 1;
    const int64_t *at = PyArray_DATA(held[1]);
    int ordered = rows >= 1 && rows <= INT32_MAX && at[0] == 0 && at[rows] == count;
    for (npy_intp b = 0; ordered && b < rows; b++)
        ordered = at[b] <= at[b + 1];
    if (!ordered) {
        PyErr_SetString(PyExc_ValueError, "offsets: expected B + 1 ascending numbers from 0 to len(ids), B >= 1");
        return -1;
    }
    *prompts = (b2_prompts){.rows = rows, .ids = PyArray_DATA(held[0]), .offsets = at};
    return 0;
}

static int search_prompts(b2py_state *state, python_step *s, PyObject *options, PyObject *hook_dict, b2_generated *out,
                          b2_err *err)
{
    b2_generate_opts opts;
    b2py_options_storage storage;
    b2py_hooks hooks = {0};
    b2py_call call;
    s->call = &call;
    int status = b2py_parse_options(options, &opts, &storage, err);
    if (status == 0 && b2py_hooks_parse(&hooks, hook_dict, &call, &opts) < 0)
        status = b2_fail(err, B2_E_CALLBACK, "hooks");
    if (status == 0)
        status = run_search(state, s, &opts, out, err);
    release_rows(s);
    b2py_hooks_release(&hooks);
    b2py_options_release(&storage);
    return status;
}

static PyObject *search(PyObject *module, PyObject *arguments)
{
    b2py_state *state = b2py_state_of_module(module);
    PyObject *function, *ids, *offsets, *options, *hooks = Py_None;
    int stacked;
    if (!PyArg_ParseTuple(arguments, "OOOO!p|O:search", &function, &ids, &offsets, &PyDict_Type, &options, &stacked,
                          &hooks))
        return NULL;
    if (!PyCallable_Check(function))
        return PyErr_Format(PyExc_TypeError, "step: expected a callable, found %s", Py_TYPE(function)->tp_name);
    PyArrayObject *held[2] = {NULL, NULL};
    b2_prompts prompts;
    PyObject *result = NULL;
    if (read_prompts(ids, offsets, &prompts, held) == 0) {
        b2_err err = {0};
        b2_generated out = {0};
        python_step step = {.base = {.prefill = prefill, .advance = advance, .leave = leave},
                            .function = function, .stacked = stacked, .prompts = &prompts};
        if (search_prompts(state, &step, options, hooks, &out, &err) == 0)
            result = b2py_generated_dict(&out);
        else
            b2py_raise(state, &err);
        b2_generated_release(&out);
    }
    Py_XDECREF(held[0]);
    Py_XDECREF(held[1]);
    return result;
}

static PyMethodDef search_methods[] = {
    {"search", search, METH_VARARGS,
     "search(step, ids, offsets, options, stacked, hooks=None, /) -> dict\n\nSee blip2c.search."},
    {0},
};

int b2py_add_search(PyObject *module)
{
    return PyModule_AddFunctions(module, search_methods);
}
