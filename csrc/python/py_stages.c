/* blip2c._core.Model, part by part: encode and its stages, the language model's forward, and what can be watched in them
 * (hidden states, attention weights). The arrays that are given back are made before the GIL is released. */
#include "python/py_model.h"

#include <string.h>

#include "core/memory.h"

static b2py_state *state_of(PyObject *self)
{
    return b2py_state_of_type(Py_TYPE(self));
}

/* ---- pictures ---- */

/* What the encoder reads: pixels, or the image embeddings that it would make of them. */
typedef struct picture_input {
    PyArrayObject *array;  /* owned */
    b2_pictures pictures;  /* data NULL: embeddings */
    int64_t tokens;        /* T of a picture */
} picture_input;

static int read_pixels(picture_input *in, PyObject *object, PyObject *self, int interpolate)
{
    const b2_vit_config *c = &b2py_loaded_model(self)->vit.config;
    if (!(in->array = b2py_floats(state_of(self), object, "pixel_values", 4, b2py_model_place(self))))
        return -1;
    npy_intp *shape = PyArray_DIMS(in->array);
    int fits = interpolate ? shape[2] >= c->patch_size && shape[3] >= c->patch_size
                           : shape[2] == c->image_size && shape[3] == c->image_size;
    if (shape[1] != c->num_channels || !fits) {
        int64_t side = interpolate ? c->patch_size : c->image_size;
        PyErr_Format(PyExc_ValueError, "pixel_values: expected shape [batch, %lld, %s%lld, %s%lld] for this model, "
                     "found [%zd, %zd, %zd, %zd]", (long long)c->num_channels, interpolate ? ">= " : "",
                     (long long)side, interpolate ? ">= " : "", (long long)side, shape[0], shape[1], shape[2], shape[3]);
        return -1;
    }
    in->pictures = (b2_pictures){PyArray_DATA(in->array), shape[0], shape[1], shape[2], shape[3]};
    in->tokens = b2_vit_tokens(c, shape[2], shape[3]);
    return 0;
}

static int read_embeds(picture_input *in, PyObject *object, PyObject *self)
{
    const b2_vit_config *c = &b2py_loaded_model(self)->vit.config;
    if (!(in->array = b2py_floats(state_of(self), object, "image_embeds", 3, b2py_model_place(self))))
        return -1;
    npy_intp *shape = PyArray_DIMS(in->array);
    if (shape[1] < 1 || shape[2] != c->hidden_size) {
        PyErr_Format(PyExc_ValueError, "image_embeds: expected shape [batch, tokens, %lld], found [%zd, %zd, %zd]",
                     (long long)c->hidden_size, shape[0], shape[1], shape[2]);
        return -1;
    }
    in->pictures = (b2_pictures){.count = shape[0]};
    in->tokens = shape[1];
    return 0;
}

int b2py_results_at(b2py_place *place, PyObject *self, int on_device)
{
    *place = on_device ? b2py_model_place(self) : (b2py_place){0};
    if (!on_device || place->device)
        return 0;
    PyErr_SetString(PyExc_ValueError, "on_device: this model is on the processor");
    return -1;
}

/* The arrays of encode. */
typedef struct stages {
    b2py_state *state;
    b2py_place place; /* where they are to be */
    PyObject *vision, *pooled, *qformer, *text, *features, *embeds, *match; /* owned; NULL where not wanted */
    b2_encoded out;
    b2py_recorder recorder;
} stages;

static void stages_release(stages *s)
{
    Py_XDECREF(s->vision);
    Py_XDECREF(s->pooled);
    Py_XDECREF(s->qformer);
    Py_XDECREF(s->text);
    Py_XDECREF(s->features);
    Py_XDECREF(s->embeds);
    Py_XDECREF(s->match);
    b2py_recorder_release(&s->recorder);
}

static int watch_vision(stages *s, const b2_vit_config *c, npy_intp *shape, b2py_wishes w)
{
    npy_intp weights[] = {shape[0], c->num_attention_heads, shape[1], shape[1]};
    if (w.hidden_states && b2py_watch_hidden(&s->recorder, s->state, "vision", "vision_hidden_states", c->num_hidden_layers, 3,
                                        shape) < 0)
        return -1;
    return w.attentions ? b2py_watch_attention(&s->recorder, s->state, "vision", "vision_attentions", c->num_hidden_layers, 1,
                                          weights)
                        : 0;
}

/* `text` tokens beside the queries of each picture; those are reported apart. */
static int watch_qformer(stages *s, const b2_qformer_config *c, npy_intp *shape, int64_t tokens,
                         int64_t text, b2py_wishes w)
{
    npy_intp queries = shape[1], heads = c->num_attention_heads;
    npy_intp self[] = {shape[0], heads, queries, queries + text}, of_text[] = {shape[0], heads, text, queries + text};
    npy_intp cross[] = {shape[0], heads, queries, tokens}, text_hidden[] = {shape[0], text, shape[2]};
    int layers = c->num_hidden_layers;
    if (text < 0)
        return -1;
    if (w.hidden_states &&
        (b2py_watch_hidden(&s->recorder, s->state, "qformer", "qformer_hidden_states", layers, 3, shape) < 0 ||
         (text > 0 && b2py_watch_hidden(&s->recorder, s->state, "qformer_text", "qformer_text_hidden_states", layers, 3,
                                   text_hidden) < 0)))
        return -1;
    if (!w.attentions)
        return 0;
    return b2py_watch_attention(&s->recorder, s->state, "qformer", "qformer_attentions", layers, 1, self) < 0 ||
                   (text > 0 && b2py_watch_attention(&s->recorder, s->state, "qformer_text", "qformer_text_attentions", layers,
                                                1, of_text) < 0) ||
                   b2py_watch_attention(&s->recorder, s->state, "qformer_cross", "qformer_cross_attentions", layers,
                                   c->cross_attention_frequency, cross) < 0
               ? -1
               : 0;
}

/* What the model reads off the queries: with a text beside them whether it matches, without one the embeddings. */
static int results_make(stages *s, const b2_blip2 *model, npy_intp count, const b2py_text *text)
{
    const b2_heads_config *heads = &model->heads.config;
    npy_intp queries = model->qformer.config.num_query_tokens;
    if (model->lm) {
        npy_intp features[] = {count, queries, model->lm->config.hidden_size};
        if (!(s->features = b2py_new_floats(s->state, s->place, 3, features, &s->out.features)))
            return -1;
    }
    if (text->given) {
        npy_intp words[] = {PyArray_DIM(text->ids, 0), model->qformer.config.hidden_size}, match[] = {count, 2};
        if (!(s->text = b2py_new_floats(s->state, s->place, 2, words, &s->out.text)) ||
            (heads->match && !(s->match = b2py_new_floats(s->state, s->place, 2, match, &s->out.match))))
            return -1;
    } else if (heads->vision) {
        npy_intp embeds[] = {count, queries, heads->projection_size};
        if (!(s->embeds = b2py_new_floats(s->state, s->place, 3, embeds, &s->out.embeds)))
            return -1;
    }
    return 0;
}

/* "vision", "pooled" and the Q-Former's arrays, each where it is to be computed. */
static int stages_make(stages *s, const b2_blip2 *model, const picture_input *in,
                       const b2py_text *text, int with_qformer, b2py_wishes w)
{
    const b2_qformer_config *q = &model->qformer.config;
    npy_intp count = in->pictures.count, width = model->vit.config.hidden_size;
    npy_intp vision[] = {count, in->tokens, width}, pooled[] = {count, width};
    npy_intp qformer[] = {count, q->num_query_tokens, q->hidden_size};
    if (in->pictures.data) {
        if (!(s->vision = b2py_new_floats(s->state, s->place, 3, vision, &s->out.vision)) ||
            !(s->pooled = b2py_new_floats(s->state, s->place, 2, pooled, &s->out.pooled)) ||
            watch_vision(s, &model->vit.config, vision, w) < 0)
            return -1;
    } else {
        s->out.vision = b2_tensor_of(PyArray_DATA(in->array), count * in->tokens, width);
    }
    if (!with_qformer)
        return 0;
    if (!(s->qformer = b2py_new_floats(s->state, s->place, 3, qformer, &s->out.qformer)) ||
        results_make(s, model, count, text) < 0)
        return -1;
    if (!w.hidden_states && !w.attentions)
        return 0;
    return watch_qformer(s, q, qformer, in->tokens, b2py_text_length(text, count), w);
}

static PyObject *stages_result(stages *s)
{
    struct {
        const char *key;
        PyObject **array;
    } parts[] = {{"vision", &s->vision}, {"pooled", &s->pooled}, {"qformer", &s->qformer}, {"text", &s->text},
                 {"image_features", &s->features}, {"embeds", &s->embeds}, {"match", &s->match}};
    PyObject *result = PyDict_New();
    for (size_t i = 0; result && i < sizeof parts / sizeof *parts; i++) {
        PyObject *array = *parts[i].array;
        if (!array)
            continue;
        *parts[i].array = b2py_give(s->state, array);
        if (!*parts[i].array || PyDict_SetItemString(result, parts[i].key, *parts[i].array) < 0)
            Py_CLEAR(result);
    }
    if (result && b2py_recorder_result(&s->recorder, result) < 0)
        Py_CLEAR(result);
    return result;
}

/* A model that looks at pictures; else NULL with the exception set. */
static const b2_blip2 *loaded_vision(PyObject *self)
{
    const b2_blip2 *model = b2py_loaded_model(self);
    if (!model || model->vit.layers)
        return model;
    PyErr_SetString(state_of(self)->unsupported_error, "this model has no vision encoder");
    return NULL;
}

static int encode(b2py_run *r, const b2_blip2 *model, const b2_encoded *out, const picture_input *in, const b2py_text *text)
{
    if (b2py_note_given(r, in->pictures.data ? "pixel_values" : "image_embeds", in->array) < 0)
        return -1;
    return b2_blip2_encode(&r->ctx, model, out, in->pictures, text->given, &r->err);
}

PyObject *b2py_model_encode_stages(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pixel_values", "hidden_states", "attentions", "interpolate", "image_embeds", "qformer", "text",
                            "on_device", NULL};
    const b2_blip2 *model = loaded_vision(self);
    PyObject *pixels = Py_None, *embeds = Py_None, *words = Py_None, *result = NULL;
    int interpolate = 0, with_qformer = 1, on_device = 0;
    b2py_wishes w = {0};
    stages s = {0};
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "|OpppOpOp", names, &pixels, &w.hidden_states, &w.attentions,
                                               &interpolate, &embeds, &with_qformer, &words, &on_device) ||
        b2py_results_at(&s.place, self, on_device) < 0)
        return NULL;
    if ((pixels == Py_None) == (embeds == Py_None)) {
        PyErr_SetString(PyExc_ValueError, "encode_stages: expected one of pixel_values and image_embeds");
        return NULL;
    }
    s.state = state_of(self);
    s.recorder.place = s.place;
    picture_input in = {0};
    b2py_text text = {0};
    int status = embeds == Py_None ? read_pixels(&in, pixels, self, interpolate) : read_embeds(&in, embeds, self);
    if (status == 0)
        status = b2py_read_text(&text, words, in.pictures.count);
    if (status == 0)
        status = stages_make(&s, model, &in, &text, with_qformer, w);
    if (status == 0) {
        b2py_run r;
        status = b2py_run_begin(&r, self, b2py_recorder_tap(&s.recorder));
        if (status == 0)
            status = b2py_run_end(&r, self, encode(&r, model, &s.out, &in, &text));
    }
    if (status == 0)
        result = stages_result(&s);
    stages_release(&s);
    b2py_text_release(&text);
    Py_XDECREF(in.array);
    return result;
}

/* One array of a plain run: `view` points into `out` where its result goes. */
static PyObject *encode_one(PyObject *self, const b2_blip2 *model, picture_input *in, b2py_text *text, PyObject *array,
                            const b2_encoded *out)
{
    if (array) {
        b2py_run r;
        if (b2py_run_begin(&r, self, NULL) < 0 ||
            b2py_run_end(&r, self, encode(&r, model, out, in, text)) < 0)
            Py_CLEAR(array);
    }
    b2py_text_release(text);
    Py_XDECREF(in->array);
    return b2py_give(state_of(self), array);
}

static PyObject *new_features(PyObject *self, b2py_place place, int64_t pictures, b2_tensor *view)
{
    const b2_blip2 *model = b2py_loaded_model(self);
    npy_intp shape[] = {pictures, model->qformer.config.num_query_tokens, model->lm->config.hidden_size};
    return b2py_new_floats(state_of(self), place, 3, shape, view);
}

PyObject *b2py_model_encode(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pixel_values", "interpolate", "text", "on_device", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    PyObject *object, *words = Py_None, *features = NULL;
    int interpolate = 0, on_device = 0;
    b2py_place place;
    picture_input in = {0};
    b2py_text text = {0};
    b2_encoded out = {0};
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|pOp", names, &object, &interpolate, &words,
                                               &on_device) ||
        b2py_results_at(&place, self, on_device) < 0)
        return NULL;
    if (read_pixels(&in, object, self, interpolate) == 0 && b2py_read_text(&text, words, in.pictures.count) == 0)
        features = new_features(self, place, in.pictures.count, &out.features);
    return encode_one(self, model, &in, &text, features, &out);
}

PyObject *b2py_model_vision(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pixel_values", "on_device", NULL};
    const b2_blip2 *model = loaded_vision(self);
    PyObject *object, *hidden = NULL;
    int on_device = 0;
    b2py_place place;
    picture_input in = {0};
    b2py_text none = {0};
    b2_encoded out = {0};
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|p", names, &object, &on_device) ||
        b2py_results_at(&place, self, on_device) < 0)
        return NULL;
    if (read_pixels(&in, object, self, 0) == 0) {
        npy_intp shape[] = {in.pictures.count, in.tokens, model->vit.config.hidden_size};
        hidden = b2py_new_floats(state_of(self), place, 3, shape, &out.vision);
    }
    return encode_one(self, model, &in, &none, hidden, &out);
}

PyObject *b2py_model_read(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image_embeds", "text", "on_device", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    PyObject *object, *words = Py_None, *features = NULL;
    int on_device = 0;
    b2py_place place;
    picture_input in = {0};
    b2py_text text = {0};
    b2_encoded out = {0};
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|Op", names, &object, &words, &on_device) ||
        b2py_results_at(&place, self, on_device) < 0)
        return NULL;
    if (read_embeds(&in, object, self) == 0 && b2py_read_text(&text, words, in.pictures.count) == 0) {
        out.vision = b2_tensor_of(PyArray_DATA(in.array), in.pictures.count * in.tokens, model->vit.config.hidden_size);
        features = new_features(self, place, in.pictures.count, &out.features);
    }
    return encode_one(self, model, &in, &text, features, &out);
}

/* ---- the language model ---- */

/* Tokens of each row where all have the same number, which is what attention weights need; -1 with the exception set. */
static int64_t equal_length(const char *what, const int64_t *offsets, int64_t rows)
{
    for (int64_t b = 1; b < rows; b++)
        if (offsets[b + 1] - offsets[b] != offsets[1] - offsets[0]) {
            PyErr_Format(PyExc_ValueError, "attentions: expected %s of one length, row 0 has %lld, row %lld has %lld",
                         what, (long long)(offsets[1] - offsets[0]), (long long)b,
                         (long long)(offsets[b + 1] - offsets[b]));
            return -1;
        }
    return rows > 0 ? offsets[1] - offsets[0] : 0;
}

/* The encoder's last hidden state, which the output holds whether or not somebody watches. */
static int watch_encoder_end(b2py_recorder *r, b2py_state *state, const b2_lm *lm, const b2_rows_in *in)
{
    npy_intp shape[] = {in->offsets[in->rows], lm->config.hidden_size};
    b2py_track plan = {.stage = "encoder", .key = "encoder_last_hidden_state", .count = 1,
                  .first = lm->config.num_hidden_layers + 1, .stride = 1, .place = r->place};
    return b2py_add_track(r->hidden, &r->hidden_count, state, plan, 2, shape);
}

/* Prompts and decoder rows of an encoder-decoder; `queries` and `keys` are the rows' lengths. */
static int watch_language(b2py_recorder *r, b2py_state *state, const b2_lm *lm, const b2_rows_in *in, b2py_wishes w)
{
    int decoder = lm->class_->encode != NULL, layers = lm->kv_layers, heads = lm->config.num_attention_heads;
    const char *stage = decoder ? "decoder" : "language_model";
    const int64_t *offsets = decoder ? in->decoder_offsets : in->offsets;
    npy_intp hidden[] = {offsets[in->rows], lm->config.hidden_size};
    npy_intp encoder_hidden[] = {in->offsets[in->rows], lm->config.hidden_size};
    if (decoder && watch_encoder_end(r, state, lm, in) < 0)
        return -1;
    if (w.hidden_states &&
        (b2py_watch_hidden(r, state, stage, decoder ? "decoder_hidden_states" : "hidden_states", layers, 2, hidden) < 0 ||
         (decoder && b2py_watch_hidden(r, state, "encoder", "encoder_hidden_states", lm->config.num_hidden_layers, 2,
                                  encoder_hidden) < 0)))
        return -1;
    if (!w.attentions)
        return 0;
    npy_intp queries = equal_length(decoder ? "decoder rows" : "rows", offsets, in->rows);
    npy_intp keys = queries < 0 ? -1 : equal_length("rows", in->offsets, in->rows);
    npy_intp self[] = {in->rows, heads, queries, queries}, cross[] = {in->rows, heads, queries, keys};
    npy_intp encoder[] = {in->rows, heads, keys, keys};
    if (keys < 0 ||
        b2py_watch_attention(r, state, stage, decoder ? "decoder_attentions" : "attentions", layers, 1, self) < 0)
        return -1;
    if (!decoder)
        return 0;
    return b2py_watch_attention(r, state, "decoder_cross", "cross_attentions", layers, 1, cross) < 0 ||
                   b2py_watch_attention(r, state, "encoder", "encoder_attentions", lm->config.num_hidden_layers, 1,
                                   encoder) < 0
               ? -1
               : 0;
}

static int forward(b2py_run *r, const b2_blip2 *model, const b2py_rows *arrays, const b2_rows_in *in, b2_tensor logits)
{
    if (b2py_note_given(r, "image_features", arrays->features) < 0)
        return -1;
    return b2_session_forward(&r->ctx, model, in, logits, &r->err);
}

static PyObject *run_forward(PyObject *self, const b2_blip2 *model, const b2py_rows *arrays, const b2_rows_in *in,
                             b2py_wishes w, b2py_place place)
{
    const int64_t *offsets = model->lm->class_->encode ? in->decoder_offsets : in->offsets;
    npy_intp shape[] = {offsets[in->rows], model->lm->config.vocab_size};
    b2py_recorder r = {.place = place};
    b2_tensor view;
    PyObject *logits = NULL, *result = NULL;
    if (watch_language(&r, state_of(self), model->lm, in, w) == 0 &&
        (logits = b2py_new_floats(state_of(self), place, 2, shape, &view))) {
        b2py_run run;
        if (b2py_run_begin(&run, self, b2py_recorder_tap(&r)) == 0 &&
            b2py_run_end(&run, self, forward(&run, model, arrays, in, view)) == 0 &&
            (logits = b2py_give(state_of(self), logits)))
            result = Py_BuildValue("{s:O}", "logits", logits);
    }
    if (result && b2py_recorder_result(&r, result) < 0)
        Py_CLEAR(result);
    Py_XDECREF(logits);
    b2py_recorder_release(&r);
    return result;
}

PyObject *b2py_model_forward(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image_features", "ids", "offsets", "mask", "hidden_states", "attentions", "decoder_ids",
                            "decoder_offsets", "decoder_mask", "on_device", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    b2py_row_objects o = {0};
    b2py_wishes w = {0};
    b2py_place place;
    int on_device = 0;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|OppOOOp", names, &o.features, &o.ids, &o.offsets,
                                               &o.mask, &w.hidden_states, &w.attentions, &o.decoder_ids,
                                               &o.decoder_offsets, &o.decoder_mask, &on_device) ||
        b2py_results_at(&place, self, on_device) < 0)
        return NULL;
    b2py_rows arrays;
    b2_rows_in in;
    PyObject *result = NULL;
    if (b2py_read_rows(&arrays, &in, self, &o) == 0)
        result = run_forward(self, model, &arrays, &in, w, place);
    b2py_rows_release(&arrays);
    return result;
}

/* ---- small parts ---- */

PyObject *b2py_model_project(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "on_device", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    PyObject *object;
    b2py_place place;
    int on_device = 0;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|p", names, &object, &on_device) ||
        b2py_results_at(&place, self, on_device) < 0)
        return NULL;
    PyArrayObject *x = b2py_floats(state_of(self), object, "x", 2, b2py_model_place(self));
    if (!x)
        return NULL;
    npy_intp rows = PyArray_DIM(x, 0), width = PyArray_DIM(x, 1);
    npy_intp shape[] = {rows, model->lm->config.hidden_size};
    b2_tensor view;
    PyObject *out = b2py_new_floats(state_of(self), place, 2, shape, &view);
    if (out) {
        b2py_run r;
        b2_tensor given = b2_tensor_of(PyArray_DATA(x), rows, width);
        if (b2py_run_begin(&r, self, NULL) < 0 ||
            b2py_run_end(&r, self, b2py_note_given(&r, "x", x) < 0
                                       ? -1
                                       : b2_blip2_project(&r.ctx, model, view, given, &r.err)) < 0)
            Py_CLEAR(out);
    }
    Py_DECREF(x);
    return b2py_give(state_of(self), out);
}

PyObject *b2py_model_embed(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "on_device", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    PyObject *object;
    b2py_place place;
    int on_device = 0;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|p", names, &object, &on_device) ||
        b2py_results_at(&place, self, on_device) < 0)
        return NULL;
    PyArrayObject *ids = b2py_array(object, "ids", NPY_INT32, 1);
    if (!ids)
        return NULL;
    const int32_t *id = PyArray_DATA(ids);
    npy_intp shape[] = {PyArray_DIM(ids, 0), model->lm->config.hidden_size};
    b2_tensor view;
    PyObject *out = NULL;
    npy_intp negative = 0;
    while (negative < shape[0] && id[negative] >= 0)
        negative++;
    if (negative < shape[0])
        PyErr_Format(PyExc_IndexError, "ids[%zd] is %d, expected a token", negative, (int)id[negative]);
    else
        out = b2py_new_floats(state_of(self), place, 2, shape, &view);
    if (out) {
        b2py_run r;
        if (b2py_run_begin(&r, self, NULL) < 0 ||
            b2py_run_end(&r, self, b2_blip2_embed(&r.ctx, model, view, id, &r.err)) < 0)
            Py_CLEAR(out);
    }
    Py_DECREF(ids);
    return b2py_give(state_of(self), out);
}
