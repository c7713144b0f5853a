/* blip2c._core.Model, continued: texts alone, the Q-Former alone, and how near pictures and texts are. */
#include "python/py_model.h"

#include <string.h>

#include "model/retrieval.h"

static b2py_state *state_of(PyObject *self)
{
    return b2py_state_of_type(Py_TYPE(self));
}

/* ---- texts alone ---- */

typedef struct text_result {
    b2py_place place; /* where they are to be */
    PyObject *hidden, *embeds; /* owned */
    b2_read out;
    b2py_recorder recorder;
} text_result;

static int watch_texts(text_result *r, b2py_state *state, const b2_qformer_config *c, const b2py_text *text,
                       int64_t count, b2py_wishes w)
{
    npy_intp length = b2py_text_length(text, count), heads = c->num_attention_heads;
    npy_intp hidden[] = {count, length, c->hidden_size}, weights[] = {count, heads, length, length};
    if (length < 0)
        return -1;
    if (w.hidden_states && b2py_watch_hidden(&r->recorder, state, "qformer_text", "qformer_text_hidden_states",
                                             c->num_hidden_layers, 3, hidden) < 0)
        return -1;
    return w.attentions ? b2py_watch_attention(&r->recorder, state, "qformer_text", "qformer_text_attentions",
                                               c->num_hidden_layers, 1, weights)
                        : 0;
}

static int text_result_make(text_result *r, b2py_state *state, const b2_blip2 *model, const b2py_text *text,
                            int64_t count, b2py_wishes w)
{
    npy_intp tokens = PyArray_DIM(text->ids, 0);
    npy_intp hidden[] = {tokens, model->qformer.config.hidden_size};
    npy_intp embeds[] = {tokens, model->heads.config.projection_size};
    if (!(r->hidden = b2py_new_floats(state, r->place, 2, hidden, &r->out.text)) ||
        (model->heads.config.text && !(r->embeds = b2py_new_floats(state, r->place, 2, embeds, &r->out.embeds))))
        return -1;
    return w.hidden_states || w.attentions ? watch_texts(r, state, &model->qformer.config, text, count, w) : 0;
}

static PyObject *text_result_dict(b2py_state *state, text_result *r)
{
    r->hidden = b2py_give(state, r->hidden);
    r->embeds = b2py_give(state, r->embeds);
    PyObject *result = r->hidden && !PyErr_Occurred() ? Py_BuildValue("{s:O}", "text", r->hidden) : NULL;
    if (result && ((r->embeds && PyDict_SetItemString(result, "embeds", r->embeds) < 0) ||
                   b2py_recorder_result(&r->recorder, result) < 0))
        Py_CLEAR(result);
    return result;
}

PyObject *b2py_model_read_texts(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"text", "hidden_states", "attentions", "on_device", NULL};
    const b2_blip2 *model = b2py_loaded_model(self);
    PyObject *words, *result = NULL;
    b2py_wishes w = {0};
    b2py_text text = {0};
    text_result r = {0};
    int on_device = 0;
    if (!model ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O|ppp", names, &words, &w.hidden_states, &w.attentions, &on_device) ||
        b2py_results_at(&r.place, self, on_device) < 0)
        return NULL;
    r.recorder.place = r.place;
    int status = b2py_read_text(&text, words, -1);
    if (status == 0 && !text.given) {
        PyErr_SetString(PyExc_TypeError, "text: expected a tuple (ids, offsets, mask), found None");
        status = -1;
    }
    if (status == 0) {
        int64_t count = PyArray_DIM(text.offsets, 0) - 1;
        status = text_result_make(&r, state_of(self), model, &text, count, w);
        if (status == 0) {
            b2py_run run;
            status = b2py_run_begin(&run, self, b2py_recorder_tap(&r.recorder));
            if (status == 0)
                status = b2py_run_end(&run, self,
                                  b2_blip2_read_texts(&run.ctx, model, &r.out, text.given, count, &run.err));
        }
    }
    if (status == 0)
        result = text_result_dict(state_of(self), &r);
    Py_XDECREF(r.hidden);
    Py_XDECREF(r.embeds);
    b2py_recorder_release(&r.recorder);
    b2py_text_release(&text);
    return result;
}

/* ---- the Q-Former alone ---- */

/* One pass over embeddings [B, L, D], the first Q of each item looking at its picture. */
typedef struct pass {
    PyArrayObject *queries, *text, *query_mask, *text_mask, *image, *image_mask, *offsets; /* owned */
    b2py_place place; /* where the results are to be */
    PyObject *query_states, *text_states;                                                   /* owned */
    b2_texts texts;
    b2_qformer_in in;
    b2_qformer_out out;
    b2py_recorder recorder;
    int64_t length; /* tokens of text of each item */
} pass;

static void pass_release(pass *p)
{
    PyArrayObject *arrays[] = {p->queries, p->text, p->query_mask, p->text_mask, p->image, p->image_mask, p->offsets};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        Py_XDECREF(arrays[i]);
    Py_XDECREF(p->query_states);
    Py_XDECREF(p->text_states);
    b2py_recorder_release(&p->recorder);
}

static int expect_shape(PyArrayObject *array, const char *name, npy_intp a, npy_intp b, npy_intp c)
{
    npy_intp *shape = PyArray_DIMS(array), last = PyArray_NDIM(array) == 3 ? shape[2] : c;
    if (shape[0] == a && (b < 0 ? shape[1] > 0 : shape[1] == b) && last == c)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: found shape [%zd, %zd, %zd], which does not fit", name, shape[0], shape[1], last);
    return -1;
}

/* None, or uint8 [B, T]. */
static int read_mask(PyArrayObject **array, PyObject *object, const char *name, npy_intp items, npy_intp length)
{
    if (object == Py_None)
        return 0;
    return (*array = b2py_array(object, name, NPY_UINT8, 2)) ? expect_shape(*array, name, items, length, 0) : -1;
}

static int read_pass_image(pass *p, PyObject *self, PyObject *image, PyObject *mask, const b2_qformer_config *c)
{
    if (p->in.queries == 0)
        return 0;
    if (!(p->image = b2py_floats(state_of(self), image, "image_embeds", 3, b2py_model_place(self))) ||
        expect_shape(p->image, "image_embeds", p->in.items, -1, c->encoder_hidden_size) < 0 ||
        read_mask(&p->image_mask, mask, "image_mask", p->in.items, PyArray_DIM(p->image, 1)) < 0)
        return -1;
    p->in.image = b2_tensor_of(PyArray_DATA(p->image), p->in.items * PyArray_DIM(p->image, 1), c->encoder_hidden_size);
    p->in.image_mask = p->image_mask ? PyArray_DATA(p->image_mask) : NULL;
    return 0;
}

/* The texts of a pass all have one length. */
static int read_pass_text(pass *p, PyObject *self, PyObject *text, PyObject *mask, const b2_qformer_config *c)
{
    if (text == Py_None)
        return 0;
    if (!(p->text = b2py_floats(state_of(self), text, "text", 3, b2py_model_place(self))) ||
        expect_shape(p->text, "text", p->in.items, -1, c->hidden_size) < 0 ||
        read_mask(&p->text_mask, mask, "text_mask", p->in.items, PyArray_DIM(p->text, 1)) < 0)
        return -1;
    npy_intp entries = p->in.items + 1;
    if (!(p->offsets = (PyArrayObject *)PyArray_SimpleNew(1, &entries, NPY_INT64)))
        return -1;
    int64_t *offsets = PyArray_DATA(p->offsets);
    p->length = PyArray_DIM(p->text, 1);
    for (npy_intp b = 0; b < entries; b++)
        offsets[b] = b * p->length;
    p->texts = (b2_texts){.embeds = PyArray_DATA(p->text),
                          .offsets = offsets,
                          .mask = p->text_mask ? PyArray_DATA(p->text_mask) : NULL};
    p->in.texts = &p->texts;
    return 0;
}

static int pass_results(pass *p, b2py_state *state, const b2_qformer_config *c, b2py_wishes w)
{
    npy_intp items = p->in.items, queries = p->in.queries, heads = c->num_attention_heads, keys = queries + p->length;
    npy_intp image = queries ? PyArray_DIM(p->image, 1) : 0;
    npy_intp of_queries[] = {items, queries, c->hidden_size}, of_text[] = {items, p->length, c->hidden_size};
    npy_intp of_queries_keys = p->in.sees == B2_SEES_ALL ? keys : queries;
    npy_intp of_text_keys = p->in.sees == B2_SEES_OWN ? p->length : keys;
    npy_intp self[] = {items, heads, queries, of_queries_keys}, text_self[] = {items, heads, p->length, of_text_keys};
    npy_intp cross[] = {items, heads, queries, image};
    int layers = c->num_hidden_layers;
    b2py_recorder *r = &p->recorder;
    if ((queries && !(p->query_states = b2py_new_floats(state, p->place, 3, of_queries, &p->out.queries))) ||
        (p->length && !(p->text_states = b2py_new_floats(state, p->place, 3, of_text, &p->out.text))))
        return -1;
    if (w.hidden_states &&
        ((queries && b2py_watch_hidden(r, state, "qformer", "qformer_hidden_states", layers, 3, of_queries) < 0) ||
         (p->length &&
          b2py_watch_hidden(r, state, "qformer_text", "qformer_text_hidden_states", layers, 3, of_text) < 0)))
        return -1;
    if (!w.attentions)
        return 0;
    return (queries && (b2py_watch_attention(r, state, "qformer", "qformer_attentions", layers, 1, self) < 0 ||
                        b2py_watch_attention(r, state, "qformer_cross", "qformer_cross_attentions", layers,
                                             c->cross_attention_frequency, cross) < 0)) ||
                   (p->length &&
                    b2py_watch_attention(r, state, "qformer_text", "qformer_text_attentions", layers, 1, text_self) < 0)
               ? -1
               : 0;
}

static PyObject *pass_dict(b2py_state *state, pass *p)
{
    p->query_states = b2py_give(state, p->query_states);
    p->text_states = b2py_give(state, p->text_states);
    PyObject *result = PyErr_Occurred() ? NULL : PyDict_New();
    if (result && ((p->query_states && PyDict_SetItemString(result, "qformer", p->query_states) < 0) ||
                   (p->text_states && PyDict_SetItemString(result, "text", p->text_states) < 0) ||
                   b2py_recorder_result(&p->recorder, result) < 0))
        Py_CLEAR(result);
    return result;
}

static int read_sees(b2_qformer_sees *sees, const char *name)
{
    static const char *const names[] = {[B2_SEES_ALL] = "all", [B2_SEES_BEFORE] = "before", [B2_SEES_OWN] = "own"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0) {
            *sees = (b2_qformer_sees)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "sees: expected all, before or own, found %s", name);
    return -1;
}

static int run_pass(b2py_run *r, const b2_blip2 *model, pass *p)
{
    return b2py_note_given(r, "query_embeds", p->queries) < 0 || b2py_note_given(r, "query_embeds", p->text) < 0 ||
                   b2py_note_given(r, "encoder_hidden_states", p->image) < 0
               ? -1
               : b2_blip2_run_qformer(&r->ctx, model, &p->out, &p->in, &r->err);
}

PyObject *b2py_model_run_qformer(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"queries", "text", "query_mask", "text_mask", "image_embeds", "image_mask",
                            "hidden_states", "attentions", "sees", "on_device", NULL};
    const b2_blip2 *model = b2py_loaded_model(self);
    const char *sees = "all";
    PyObject *queries, *text = Py_None, *query_mask = Py_None, *text_mask = Py_None, *image = Py_None;
    PyObject *image_mask = Py_None, *result = NULL;
    b2py_wishes w = {0};
    pass p = {0};
    int on_device = 0;
    if (!model ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOOOOppsp", names, &queries, &text, &query_mask, &text_mask, &image,
                                     &image_mask, &w.hidden_states, &w.attentions, &sees, &on_device) ||
        read_sees(&p.in.sees, sees) < 0 || b2py_results_at(&p.place, self, on_device) < 0)
        return NULL;
    p.recorder.place = p.place;
    const b2_qformer_config *c = &model->qformer.config;
    if ((p.queries = b2py_floats(state_of(self), queries, "queries", 3, b2py_model_place(self)))) {
        p.in.items = PyArray_DIM(p.queries, 0);
        p.in.queries = PyArray_DIM(p.queries, 1);
        p.in.embeds = b2_tensor_of(PyArray_DATA(p.queries), p.in.items * p.in.queries, c->hidden_size);
        int status = expect_shape(p.queries, "queries", p.in.items, p.in.queries, c->hidden_size);
        if (status == 0)
            status = read_mask(&p.query_mask, query_mask, "query_mask", p.in.items, p.in.queries);
        p.in.query_mask = p.query_mask ? PyArray_DATA(p.query_mask) : NULL;
        if (status == 0 && read_pass_image(&p, self, image, image_mask, c) == 0 &&
            read_pass_text(&p, self, text, text_mask, c) == 0 && pass_results(&p, state_of(self), c, w) == 0) {
            b2py_run run;
            if (b2py_run_begin(&run, self, b2py_recorder_tap(&p.recorder)) == 0 &&
                b2py_run_end(&run, self, run_pass(&run, model, &p)) == 0)
                result = pass_dict(state_of(self), &p);
        }
    }
    pass_release(&p);
    return result;
}

/* ---- how near they are ---- */

static PyObject *match_all(PyObject *self, const b2_blip2 *model, PyArrayObject *images, const b2py_text *text,
                           PyArrayObject *picture_of)
{
    npy_intp *shape = PyArray_DIMS(images), out_shape[] = {PyArray_DIM(picture_of, 0), 2};
    b2_tensor view;
    PyObject *out = b2py_new_floats(state_of(self), (b2py_place){0}, 2, out_shape, &view);
    if (out) {
        b2py_run run;
        b2_tensor given = b2_tensor_of(PyArray_DATA(images), shape[0] * shape[1], shape[2]);
        if (b2py_run_begin(&run, self, NULL) < 0 ||
            b2py_run_end(&run, self, b2_blip2_match(&run.ctx, model, view, given, shape[0], text->given,
                                                    PyArray_DATA(picture_of), &run.err)) < 0)
            Py_CLEAR(out);
    }
    return out;
}

PyObject *b2py_model_match(PyObject *self, PyObject *args)
{
    const b2_blip2 *model = b2py_loaded_model(self);
    PyObject *image_object, *words, *number_object, *out = NULL;
    if (!model || !PyArg_ParseTuple(args, "OOO:match", &image_object, &words, &number_object))
        return NULL;
    b2py_text text = {0};
    PyArrayObject *images = b2py_floats(state_of(self), image_object, "image_embeds", 3, b2py_model_place(self));
    PyArrayObject *numbers = images ? b2py_array(number_object, "picture_of", NPY_INT32, 1) : NULL;
    if (numbers && PyArray_DIM(images, 2) != model->qformer.config.encoder_hidden_size)
        PyErr_Format(PyExc_ValueError, "image_embeds: expected a width of %lld, found %zd",
                     (long long)model->qformer.config.encoder_hidden_size, PyArray_DIM(images, 2));
    else if (numbers && PyArray_DIM(images, 1) < 1)
        PyErr_SetString(PyExc_ValueError, "image_embeds: pictures of no tokens");
    else if (numbers && b2py_read_text(&text, words, PyArray_DIM(numbers, 0)) == 0) {
        if (text.given)
            out = match_all(self, model, images, &text, numbers);
        else
            PyErr_SetString(PyExc_TypeError, "text: expected a tuple (ids, offsets, mask), found None");
    }
    b2py_text_release(&text);
    Py_XDECREF(images);
    Py_XDECREF(numbers);
    return out;
}

PyObject *b2py_model_similarity(PyObject *self, PyObject *args)
{
    PyObject *image_object, *text_object, *out = NULL;
    if (!PyArg_ParseTuple(args, "OO:similarity", &image_object, &text_object))
        return NULL;
    PyArrayObject *images = b2py_array(image_object, "images", NPY_FLOAT32, 3);
    PyArrayObject *texts = images ? b2py_array(text_object, "texts", NPY_FLOAT32, 2) : NULL;
    if (texts && (PyArray_DIM(images, 1) < 1 || PyArray_DIM(images, 2) != PyArray_DIM(texts, 1))) {
        PyErr_Format(PyExc_ValueError, "similarity: images [%zd, %zd, %zd] and texts [%zd, %zd] do not fit",
                     PyArray_DIM(images, 0), PyArray_DIM(images, 1), PyArray_DIM(images, 2), PyArray_DIM(texts, 0),
                     PyArray_DIM(texts, 1));
    } else if (texts) {
        npy_intp count = PyArray_DIM(images, 0), queries = PyArray_DIM(images, 1), width = PyArray_DIM(images, 2);
        npy_intp shape[] = {count, PyArray_DIM(texts, 0)};
        b2_tensor view;
        if ((out = b2py_new_floats(state_of(self), (b2py_place){0}, 2, shape, &view))) {
            b2py_run run;
            b2_tensor pictures = b2_tensor_of(PyArray_DATA(images), count * queries, width);
            b2_tensor words = b2_tensor_of(PyArray_DATA(texts), shape[1], width);
            if (b2py_run_begin_on_host(&run, self) < 0 ||
                b2py_run_end(&run, self, b2_similarity(&run.ctx, view, pictures, words, queries, &run.err)) < 0)
                Py_CLEAR(out);
        }
    }
    Py_XDECREF(images);
    Py_XDECREF(texts);
    return out;
}
