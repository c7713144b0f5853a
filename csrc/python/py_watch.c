#include "python/py_watch.h"

#include <string.h>

#include "core/memory.h"

/* Where the next `size` floats of a layer go. The states behind the final norm (layer = count) replace those before it:
 * transformers' last hidden states are normalised. */
static float *next_floats(b2py_track *t, int layer, int64_t size, b2_err *err)
{
    int at = (layer - t->first) / t->stride, array = at < t->count ? at : t->count - 1;
    if (at > t->count || t->filled[at] + size > t->size) {
        b2_fail(err, B2_E_INTERNAL, "%s: layer %d does not fit what was planned for", t->key, layer);
        return NULL;
    }
    float *to = t->data[array] + t->filled[at];
    t->filled[at] += size;
    return to;
}

static int record_hidden(b2_tap *tap, b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err)
{
    b2py_recorder *r = (b2py_recorder *)tap;
    for (int i = 0; i < r->hidden_count; i++) {
        b2py_track *t = &r->hidden[i];
        if (strcmp(t->stage, stage) != 0 || layer < t->first)
            continue;
        float *to = next_floats(t, layer, hidden.rows * hidden.cols, err);
        if (!to || b2_download_rows(ctx, b2_tensor_of(to, hidden.rows, hidden.cols), hidden, err) < 0)
            return -1;
    }
    return 0;
}

int64_t b2py_attention_size(const b2_attention_args *args)
{
    int64_t size = 0;
    for (int64_t b = 0; b < args->rows; b++) {
        int64_t keys = (int64_t)args->prefix_lens[b] + (args->suffix_lens ? args->suffix_lens[b] : 0);
        size += args->heads * ((int64_t)args->q_offsets[b + 1] - args->q_offsets[b]) * keys;
    }
    return size;
}

int b2py_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err)
{
    size_t count = (size_t)b2py_attention_size(args);
    if (b2_on_host(ctx))
        return b2_attention_weights(ctx, weights, args, err);
    float *there = b2_memory_alloc(ctx->memory, count, sizeof *there, "attention weights", err);
    int status = there ? b2_attention_weights(ctx, there, args, err) : -1;
    if (status == 0)
        status = b2_download(ctx, weights, there, count * sizeof *there, err);
    if (status < 0)
        b2_wait(ctx);
    b2_memory_free(ctx->memory, there);
    return status;
}

static int record_attention(b2_tap *tap, b2_ctx *ctx, const char *stage, int layer, const b2_attention_args *args,
                            b2_err *err)
{
    b2py_recorder *r = (b2py_recorder *)tap;
    for (int i = 0; i < r->attention_count; i++) {
        if (strcmp(r->attention[i].stage, stage) != 0)
            continue;
        float *to = next_floats(&r->attention[i], layer, b2py_attention_size(args), err);
        return to ? b2py_attention_weights(ctx, to, args, err) : -1;
    }
    return 0;
}

static void release_tracks(b2py_track *tracks, int count)
{
    for (int i = 0; i < count; i++) {
        Py_XDECREF(tracks[i].arrays);
        b2_free(tracks[i].data);
        b2_free(tracks[i].filled);
    }
}

void b2py_recorder_release(b2py_recorder *r)
{
    release_tracks(r->hidden, r->hidden_count);
    release_tracks(r->attention, r->attention_count);
    r->hidden_count = r->attention_count = 0;
}

int b2py_add_track(b2py_track *tracks, int *count, b2py_state *state, b2py_track plan, int ndim, npy_intp *shape)
{
    b2_err err = {0};
    b2py_track *t = &tracks[(*count)++];
    *t = plan;
    t->size = PyArray_MultiplyList(shape, ndim);
    t->data = b2_alloc_zeroed((size_t)t->count, sizeof *t->data, t->key, &err);
    t->filled = b2_alloc_zeroed((size_t)t->count + 1, sizeof *t->filled, t->key, &err);
    if (!t->data || !t->filled) {
        b2py_raise(state, &err);
        return -1;
    }
    if (!(t->arrays = PyList_New(0)))
        return -1;
    for (int i = 0; i < t->count; i++) {
        b2_tensor view;
        PyObject *array = b2py_give(state, b2py_new_floats(state, t->place, ndim, shape, &view));
        if (!array || PyList_Append(t->arrays, array) < 0) {
            Py_XDECREF(array);
            return -1;
        }
        t->data[i] = view.data;
        Py_DECREF(array);
    }
    return 0;
}

int b2py_watch_hidden(b2py_recorder *r, b2py_state *state, const char *stage, const char *key, int layers, int ndim,
                      npy_intp *shape)
{
    b2py_track plan = {.stage = stage, .key = key, .count = layers + 1, .stride = 1, .place = r->place};
    return b2py_add_track(r->hidden, &r->hidden_count, state, plan, ndim, shape);
}

int b2py_watch_attention(b2py_recorder *r, b2py_state *state, const char *stage, const char *key, int layers,
                         int stride, npy_intp *shape)
{
    b2py_track plan = {.stage = stage, .key = key, .count = (layers + stride - 1) / stride, .stride = stride,
                       .place = r->place};
    return b2py_add_track(r->attention, &r->attention_count, state, plan, 4, shape);
}

b2_tap *b2py_recorder_tap(b2py_recorder *r)
{
    r->tap = (b2_tap){record_hidden, r->attention_count > 0 ? record_attention : NULL};
    return r->hidden_count + r->attention_count > 0 ? &r->tap : NULL;
}

/* Puts the arrays under their keys. A stage that did not report all of them is a fault here, not somebody's numbers. */
static int put_tracks(const b2py_track *tracks, int count, PyObject *result)
{
    for (int i = 0; i < count; i++) {
        for (int a = 0; a < tracks[i].count; a++)
            if (tracks[i].filled[a] != tracks[i].size) {
                PyErr_Format(PyExc_RuntimeError, "%s: layer %d was not reported", tracks[i].key,
                             tracks[i].first + a * tracks[i].stride);
                return -1;
            }
        if (PyDict_SetItemString(result, tracks[i].key, tracks[i].arrays) < 0)
            return -1;
    }
    return 0;
}

int b2py_recorder_result(const b2py_recorder *r, PyObject *result)
{
    return put_tracks(r->hidden, r->hidden_count, result) < 0
               ? -1
               : put_tracks(r->attention, r->attention_count, result);
}

/* ---- texts ---- */

void b2py_text_release(b2py_text *in)
{
    Py_XDECREF(in->ids);
    Py_XDECREF(in->offsets);
    Py_XDECREF(in->mask);
}

/* Packed: offsets run from 0 to the number of ids. */
static int check_text(const b2py_text *in, int64_t items)
{
    const int64_t *offsets = PyArray_DATA(in->offsets);
    npy_intp tokens = PyArray_DIM(in->ids, 0), rows = PyArray_DIM(in->offsets, 0) - 1;
    if (rows < 0 || (items >= 0 && rows != items)) {
        PyErr_Format(PyExc_ValueError, "text: expected %lld texts, found %zd", (long long)items, (Py_ssize_t)rows);
        return -1;
    }
    int fits = offsets[0] == 0 && offsets[rows] == tokens;
    for (npy_intp b = 0; fits && b < rows; b++)
        fits = offsets[b] <= offsets[b + 1];
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "text: expected offsets that run from 0 to %zd", (Py_ssize_t)tokens);
        return -1;
    }
    if (in->mask && PyArray_DIM(in->mask, 0) != tokens) {
        PyErr_Format(PyExc_ValueError, "text: %zd ids, a mask of %zd", (Py_ssize_t)tokens,
                     (Py_ssize_t)PyArray_DIM(in->mask, 0));
        return -1;
    }
    return 0;
}

int b2py_read_text(b2py_text *in, PyObject *object, int64_t items)
{
    PyObject *ids, *offsets, *mask;
    if (object == Py_None)
        return 0;
    if (!PyTuple_Check(object) || !PyArg_ParseTuple(object, "OOO", &ids, &offsets, &mask)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "text: expected None or a tuple (ids, offsets, mask)");
        return -1;
    }
    if (!(in->ids = b2py_array(ids, "text ids", NPY_INT32, 1)) ||
        !(in->offsets = b2py_array(offsets, "text offsets", NPY_INT64, 1)) ||
        (mask != Py_None && !(in->mask = b2py_array(mask, "text mask", NPY_UINT8, 1))) || check_text(in, items) < 0)
        return -1;
    in->texts = (b2_texts){.ids = PyArray_DATA(in->ids),
                           .offsets = PyArray_DATA(in->offsets),
                           .mask = in->mask ? PyArray_DATA(in->mask) : NULL};
    in->given = &in->texts;
    return 0;
}

int64_t b2py_text_length(const b2py_text *in, int64_t items)
{
    if (!in->given)
        return 0;
    for (int64_t b = 1; b < items; b++)
        if (in->texts.offsets[b + 1] - in->texts.offsets[b] != in->texts.offsets[1]) {
            PyErr_SetString(PyExc_ValueError, "text: hidden states and attentions need texts of one length");
            return -1;
        }
    return items > 0 ? in->texts.offsets[1] : 0;
}
