/* Model.generate_stream: items come from one Python callable and go to another while the batch runs. The GIL is held for
 * the calls alone. */
#include "python/py_model.h"

#include <string.h>

#include "core/memory.h"
#include "python/py_search.h"

/* Beyond any machine; memory is taken for every place. */
enum { MOST_PLACES = 65536 };

/* What an item's pointers point to, from next() to done(). */
typedef struct held {
    int64_t index; /* -1: free */
    PyObject *tuple;
    PyArrayObject *features, *ids, *rules, *mask, *decoder_ids;
    int32_t *joined; /* the prefix's rule ids and the item's own, one after another; NULL without a prefix */
    b2_prompt prompt;
    uint64_t key;
} held;

typedef struct stream {
    b2_source source; /* first */
    b2_sink sink;
    b2py_call *call;
    PyObject *model;
    PyObject *next, *done;
    const b2_blip2 *weights;
    int32_t pad_id;
    int64_t count;  /* items so far */
    int64_t places;
    held *items;    /* [places] */
} stream;

static void let_go(held *h)
{
    Py_CLEAR(h->tuple);
    Py_CLEAR(h->features);
    Py_CLEAR(h->ids);
    Py_CLEAR(h->rules);
    Py_CLEAR(h->mask);
    Py_CLEAR(h->decoder_ids);
    b2_free(h->joined);
    *h = (held){.index = -1};
}

static held *find(stream *s, int64_t index)
{
    held *h = s->items;
    while (h->index != index)
        h++;
    return h;
}

static int read_optional(PyArrayObject **array, PyObject *object, const char *name, int type, int ndim)
{
    if (object == Py_None)
        return 0;
    return (*array = b2py_array(object, name, type, ndim)) ? 0 : -1;
}

static int wrong_length(const char *name, int64_t expected, npy_intp found)
{
    PyErr_Format(PyExc_ValueError, "%s: expected %lld entries, found %zd", name, (long long)expected, found);
    return -1;
}

static int check_item(const held *h, const b2_blip2 *model)
{
    int64_t width = model->lm->config.hidden_size;
    npy_intp timeline = PyArray_DIM(h->decoder_ids ? h->decoder_ids : h->ids, 0);
    if (h->features && (PyArray_DIM(h->features, 1) != width || PyArray_DIM(h->features, 0) < 1)) {
        PyErr_Format(PyExc_ValueError, "image_features: expected shape [places, %lld], found [%zd, %zd]", (long long)width,
                     PyArray_DIM(h->features, 0), PyArray_DIM(h->features, 1));
        return -1;
    }
    if (PyArray_DIM(h->rules, 0) != timeline)
        return wrong_length("rule_ids", timeline, PyArray_DIM(h->rules, 0));
    if (h->mask && PyArray_DIM(h->mask, 0) != PyArray_DIM(h->ids, 0))
        return wrong_length("mask", PyArray_DIM(h->ids, 0), PyArray_DIM(h->mask, 0));
    return 0;
}

/* (image_features, ids, rule_ids, mask, prefix, decoder_ids, key) */
static int read_item(stream *s, held *h, PyObject *tuple)
{
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 7) {
        PyErr_Format(PyExc_TypeError, "next: expected a tuple (image_features, ids, rule_ids, mask, prefix, decoder_ids, "
                     "key), found %s", Py_TYPE(tuple)->tp_name);
        return -1;
    }
    h->tuple = Py_NewRef(tuple);
    PyObject *features = PyTuple_GET_ITEM(tuple, 0);
    if ((features != Py_None &&
         !(h->features = b2py_floats(b2py_state_of_type(Py_TYPE(s->model)), features, "image_features", 2,
                                     b2py_model_place(s->model)))) ||
        !(h->ids = b2py_array(PyTuple_GET_ITEM(tuple, 1), "ids", NPY_INT32, 1)) ||
        !(h->rules = b2py_array(PyTuple_GET_ITEM(tuple, 2), "rule_ids", NPY_INT32, 1)) ||
        read_optional(&h->mask, PyTuple_GET_ITEM(tuple, 3), "mask", NPY_UINT8, 1) < 0 ||
        read_optional(&h->decoder_ids, PyTuple_GET_ITEM(tuple, 5), "decoder_ids", NPY_INT32, 1) < 0 ||
        check_item(h, s->weights) < 0)
        return -1;
    h->prompt = (b2_prompt){.ids = PyArray_DATA(h->ids),
                            .mask = h->mask ? PyArray_DATA(h->mask) : NULL,
                            .length = PyArray_DIM(h->ids, 0),
                            .prefix = b2py_prefix_of(s->model, PyTuple_GET_ITEM(tuple, 4), "prefix")};
    if (PyErr_Occurred())
        return -1;
    h->key = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, 6));
    if (PyErr_Occurred())
        return -1;
    if (h->features)
        h->prompt.features = b2_tensor_of(PyArray_DATA(h->features), PyArray_DIM(h->features, 0),
                                          PyArray_DIM(h->features, 1));
    if (h->decoder_ids) {
        h->prompt.decoder_ids = PyArray_DATA(h->decoder_ids);
        h->prompt.decoder_length = PyArray_DIM(h->decoder_ids, 0);
    }
    return 0;
}

static int describe(b2_item *item, held *h, b2_err *err)
{
    const b2_prefix *prefix = h->prompt.prefix;
    int64_t own = PyArray_DIM(h->rules, 0), first = prefix ? prefix->length : 0;
    int64_t pads = 0;
    while (!prefix && !h->decoder_ids && h->prompt.mask && pads < own && !h->prompt.mask[pads])
        pads++;
    *item = (b2_item){.index = h->index,
                      .ids = PyArray_DATA(h->rules),
                      .length = first + own,
                      .skip = pads,
                      .key = h->key,
                      .prompt = &h->prompt};
    if (!prefix)
        return 0;
    if (!(h->joined = b2_alloc((size_t)item->length, sizeof *h->joined, "ids of a prompt", err)))
        return -1;
    memcpy(h->joined, prefix->rule_ids, (size_t)first * sizeof *h->joined);
    memcpy(h->joined + first, item->ids, (size_t)own * sizeof *h->joined);
    item->ids = h->joined;
    return 0;
}

/* What next() gave: a tuple, None or StopIteration. */
static int take_answer(stream *s, PyObject *answer, b2_item *item, int wait, b2_sourced *found, b2_err *err)
{
    if (!answer && PyErr_ExceptionMatches(PyExc_StopIteration)) {
        PyErr_Clear();
        *found = B2_SOURCE_END;
        return 0;
    }
    if (answer == Py_None && !wait) {
        *found = B2_SOURCE_LATER;
        return 0;
    }
    if (answer == Py_None)
        PyErr_SetString(PyExc_ValueError, "next: returned None where nothing runs: with wait=True it must wait for an item "
                        "or raise StopIteration");
    if (!answer || answer == Py_None)
        return b2_fail(err, B2_E_CALLBACK, "next raised");
    held *h = find(s, -1);
    *found = B2_SOURCE_ITEM;
    if (read_item(s, h, answer) < 0)
        return b2_fail(err, B2_E_CALLBACK, "next");
    h->index = s->count++;
    return describe(item, h, err);
}

static int next(b2_source *source, b2_item *item, int wait, b2_sourced *found, b2_err *err)
{
    stream *s = (stream *)source;
    b2py_call_hold(s->call);
    PyObject *answer = PyObject_CallOneArg(s->next, wait ? Py_True : Py_False);
    int status = take_answer(s, answer, item, wait, found, err);
    Py_XDECREF(answer);
    b2py_call_resume(s->call);
    return status;
}

static PyObject *finished_dict(const b2_finished *finished, int32_t pad)
{
    npy_intp rows = finished->rows, shape[2] = {rows, 0};
    for (npy_intp j = 0; j < rows; j++)
        shape[1] = finished->lengths[j] > shape[1] ? (npy_intp)finished->lengths[j] : shape[1];
    PyObject *ids = PyArray_SimpleNew(2, shape, NPY_INT64), *lengths = PyArray_SimpleNew(1, &rows, NPY_INT64);
    PyObject *scores = PyArray_SimpleNew(1, &rows, NPY_FLOAT32);
    if (!ids || !lengths || !scores) {
        Py_XDECREF(ids);
        Py_XDECREF(lengths);
        Py_XDECREF(scores);
        return NULL;
    }
    int64_t *to = PyArray_DATA((PyArrayObject *)ids);
    for (npy_intp j = 0; j < rows; j++)
        for (npy_intp i = 0; i < shape[1]; i++)
            *to++ = i < finished->lengths[j] ? finished->ids[j * finished->ld + i] : pad;
    memcpy(PyArray_DATA((PyArrayObject *)lengths), finished->lengths, (size_t)rows * sizeof *finished->lengths);
    memcpy(PyArray_DATA((PyArrayObject *)scores), finished->scores, (size_t)rows * sizeof *finished->scores);
    return Py_BuildValue("{s:N,s:N,s:N}", "ids", ids, "lengths", lengths, "scores", scores);
}

static int done(b2_sink *sink, const b2_finished *finished, b2_err *err)
{
    stream *s = (stream *)((char *)sink - offsetof(stream, sink));
    b2py_call_hold(s->call);
    let_go(find(s, finished->index));
    PyObject *result = finished_dict(finished, s->pad_id);
    PyObject *answer = result ? PyObject_CallFunction(s->done, "LO", (long long)finished->index, result) : NULL;
    int status = answer ? 0 : b2_fail(err, B2_E_CALLBACK, "done raised");
    Py_XDECREF(result);
    Py_XDECREF(answer);
    b2py_call_resume(s->call);
    return status;
}

static PyObject *run_stream(stream *s, const b2_stream_size *size, const b2_generate_opts *opts)
{
    b2_session_stats stats = {0};
    b2py_run r;
    s->call = &r.call;
    if (b2py_run_begin(&r, s->model, NULL) < 0)
        return NULL;
    int status = b2_session_stream(&r.ctx, s->weights, size, &s->source, &s->sink, opts, &stats, &r.err);
    if (b2py_run_end(&r, s->model, status) < 0)
        return NULL;
    PyObject *result = PyDict_New();
    if (result && b2py_add_stats(result, &stats) < 0)
        Py_CLEAR(result);
    return result;
}

static PyObject *stream_items(stream *s, const b2_stream_size *size, const b2_generate_opts *opts, b2_err *err)
{
    if (size->places < 1 || size->places > MOST_PLACES) {
        b2_fail(err, B2_E_VALUE, "places: expected 1 to %d, found %lld", MOST_PLACES, (long long)size->places);
        return NULL;
    }
    s->items = b2_alloc((size_t)size->places, sizeof *s->items, "items", err);
    for (int64_t i = 0; s->items && i < size->places; i++)
        s->items[i] = (held){.index = -1};
    PyObject *result = s->items ? run_stream(s, size, opts) : NULL;
    for (int64_t i = 0; s->items && i < size->places; i++)
        let_go(&s->items[i]);
    b2_free(s->items);
    return result;
}

PyObject *b2py_model_generate_stream(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"next", "done", "options", "places", "longest", "longest_decoder", "masked", NULL};
    stream s = {.source = {next}, .sink = {done}, .model = self, .weights = b2py_language_model(self)};
    PyObject *options;
    long long places, longest, longest_decoder = 0;
    b2_stream_size size = {0};
    if (!s.weights || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOOLL|Lp", names, &s.next, &s.done, &options, &places,
                                                   &longest, &longest_decoder, &size.masked))
        return NULL;
    size.places = places;
    size.longest = longest;
    size.longest_decoder = longest_decoder;
    b2_generate_opts opts;
    b2py_options_storage storage;
    b2_err err = {0};
    PyObject *result = NULL;
    if (b2py_parse_options(options, &opts, &storage, &err) == 0) {
        s.pad_id = opts.pad_id;
        result = stream_items(&s, &size, &opts, &err);
    }
    if (!result)
        b2py_raise(b2py_state_of_type(Py_TYPE(self)), &err);
    b2py_options_release(&storage);
    return result;
}
