/* blip2c._core.Model: immutable weights; encode, forward, generate. */
#include "python/py_common.h"

#include <string.h>

#include "core/memory.h"
#include "model/blip2.h"
#include "model/session.h"
#include "ops/weights.h"
#include "python/py_config.h"
#include "python/py_dtype.h"
#include "python/py_search.h"

typedef struct model_object {
    PyObject_HEAD
    b2_blip2 model;
    int loaded;
} model_object;

static b2py_state *state_of(PyObject *self)
{
    return b2py_state_of_type(Py_TYPE(self));
}

/* ---- life ---- */

static int refuse_second_load(const model_object *self)
{
    if (self->loaded)
        PyErr_SetString(PyExc_RuntimeError, "Model: already loaded");
    return self->loaded ? -1 : 0;
}

static int load(model_object *self, const b2_blip2_config *config, PyObject *path_list,
                const b2_dtype_policy policies[B2_PART_COUNT])
{
    b2py_state *state = state_of((PyObject *)self);
    b2_err err = {0};
    Py_ssize_t count = PySequence_Fast_GET_SIZE(path_list);
    const char **paths = b2_alloc((size_t)count, sizeof *paths, "paths", &err);
    if (!paths) {
        b2py_raise(state, &err);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        paths[i] = PyBytes_AsString(PySequence_Fast_GET_ITEM(path_list, i)); /* os.fsencode'd by the caller */
        if (!paths[i]) {
            b2_free(paths);
            return -1;
        }
    }
    b2_blip2 model;
    b2py_call call;
    b2_cancel *cancel = b2py_call_begin(&call);
    int status = b2_blip2_load(&model, config, paths, count, policies, state->pool, cancel, &err);
    b2py_call_end(&call);
    b2_free(paths);
    if (status < 0) {
        b2py_raise(state, &err);
    } else if ((status = refuse_second_load(self)) < 0) { /* another thread's came first */
        b2_blip2_release(&model);
    } else {
        self->model = model;
        self->loaded = 1;
    }
    return status;
}

/* Paths as bytes in the file system's encoding. */
static PyObject *encode_paths(PyObject *paths)
{
    PyObject *items = PySequence_Tuple(paths); /* a tuple: the __fspath__ of an item cannot change it */
    if (!items && PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_SetString(PyExc_TypeError, "paths: expected a sequence of file names");
    PyObject *encoded = items ? PyList_New(0) : NULL;
    for (Py_ssize_t i = 0; encoded && i < PyTuple_GET_SIZE(items); i++) {
        PyObject *bytes = NULL;
        if (!PyUnicode_FSConverter(PyTuple_GET_ITEM(items, i), &bytes) || PyList_Append(encoded, bytes) < 0)
            Py_CLEAR(encoded);
        Py_XDECREF(bytes);
    }
    Py_XDECREF(items);
    return encoded;
}

static int model_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"paths", "config", "dtype", NULL};
    model_object *self = (model_object *)object;
    b2py_state *state = state_of(object);
    PyObject *paths, *config, *dtype = NULL;
    b2_dtype_policy policies[B2_PART_COUNT] = {0};
    b2_blip2_config parsed = {0};
    if (refuse_second_load(self) < 0 ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O", names, &paths, &config, &dtype) ||
        (dtype && b2py_read_policies(state, dtype, policies) < 0) || b2py_read_config(state, config, &parsed) < 0)
        return -1;
    PyObject *encoded = encode_paths(paths);
    int status = encoded ? load(self, &parsed, encoded, policies) : -1;
    Py_XDECREF(encoded);
    return status;
}

static void model_dealloc(PyObject *object)
{
    model_object *self = (model_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->loaded)
        b2_blip2_release(&self->model);
    type->tp_free(object);
    Py_DECREF(type);
}

static const b2_blip2 *loaded_model(PyObject *object)
{
    model_object *self = (model_object *)object;
    if (self->loaded)
        return &self->model;
    PyErr_SetString(PyExc_RuntimeError, "Model: not loaded");
    return NULL;
}

/* ---- running ---- */

/* A context for one call: its own scratch, the module's threads. */
typedef struct run {
    b2py_call call;
    b2_arena arena;
    b2_ctx ctx;
    b2_err err;
} run;

static void run_begin(run *r, PyObject *self, b2_tap *tap)
{
    b2py_state *state = state_of(self);
    *r = (run){0};
    r->ctx = (b2_ctx){.ops = state->ops, .pool = state->pool, .scratch = &r->arena, .tap = tap};
    r->ctx.cancel = b2py_call_begin(&r->call);
}

/* 0, or -1 with the exception set. */
static int run_end(run *r, PyObject *self, int status)
{
    b2_arena_release(&r->arena);
    b2py_call_end(&r->call);
    if (status < 0)
        b2py_raise(state_of(self), &r->err);
    return status;
}

/* Copies hidden states into arrays that were made before the GIL was released. Groups arrive in order. */
typedef struct recorder {
    b2_tap tap;
    const char *stage;
    PyObject *arrays;    /* list of layers + 1 float32 arrays */
    float **data;        /* [layers + 1] */
    int64_t *rows_seen;  /* [layers + 1] */
    struct recorder *next;
} recorder;

static int record(b2_tap *tap, const char *stage, int layer, b2_tensor hidden, b2_err *err)
{
    (void)err;
    for (recorder *r = (recorder *)tap; r; r = r->next) {
        if (strcmp(r->stage, stage) != 0)
            continue;
        float *to = r->data[layer] + r->rows_seen[layer] * hidden.cols;
        for (int64_t i = 0; i < hidden.rows; i++)
            memcpy(to + i * hidden.cols, hidden.data + i * hidden.ld, (size_t)hidden.cols * sizeof *to);
        r->rows_seen[layer] += hidden.rows;
    }
    return 0;
}

/* May come twice: recorder_make releases what it could not finish. */
static void recorder_release(recorder *r)
{
    Py_XDECREF(r->arrays);
    b2_free(r->data);
    b2_free(r->rows_seen);
    *r = (recorder){0};
}

static int recorder_make(recorder *r, b2py_state *state, const char *stage, int layers, int ndim, npy_intp *shape)
{
    b2_err err = {0};
    *r = (recorder){.tap = {record}, .stage = stage};
    r->data = b2_alloc_zeroed((size_t)layers + 1, sizeof *r->data, "hidden states", &err);
    r->rows_seen = b2_alloc_zeroed((size_t)layers + 1, sizeof *r->rows_seen, "hidden states", &err);
    r->arrays = PyList_New(0);
    if (!r->data || !r->rows_seen || !r->arrays) {
        if (err.code != B2_OK)
            b2py_raise(state, &err);
        recorder_release(r);
        return -1;
    }
    for (int i = 0; i <= layers; i++) {
        PyObject *array = PyArray_SimpleNew(ndim, shape, NPY_FLOAT32);
        if (!array || PyList_Append(r->arrays, array) < 0) {
            Py_XDECREF(array);
            recorder_release(r);
            return -1;
        }
        r->data[i] = PyArray_DATA((PyArrayObject *)array);
        Py_DECREF(array);
    }
    return 0;
}

static PyObject *new_float_array(int ndim, npy_intp *shape, b2_tensor *view)
{
    PyObject *array = PyArray_SimpleNew(ndim, shape, NPY_FLOAT32);
    if (!array)
        return NULL;
    int64_t rows = 1;
    for (int i = 0; i + 1 < ndim; i++)
        rows *= shape[i];
    *view = b2_tensor_of(PyArray_DATA((PyArrayObject *)array), rows, shape[ndim - 1]);
    return array;
}

static PyArrayObject *pixel_array(PyObject *object, const b2_vit_config *c)
{
    PyArrayObject *pixels = b2py_array(object, "pixel_values", NPY_FLOAT32, 4);
    if (!pixels)
        return NULL;
    npy_intp *shape = PyArray_DIMS(pixels);
    if (shape[1] == c->num_channels && shape[2] == c->image_size && shape[3] == c->image_size)
        return pixels;
    PyErr_Format(PyExc_ValueError,
                 "pixel_values: expected shape [batch, %lld, %lld, %lld] for this model, found [%zd, %zd, %zd, %zd]",
                 (long long)c->num_channels, (long long)c->image_size, (long long)c->image_size, shape[0], shape[1],
                 shape[2], shape[3]);
    Py_DECREF(pixels);
    return NULL;
}

static PyObject *model_encode(PyObject *self, PyObject *object)
{
    const b2_blip2 *model = loaded_model(self);
    PyArrayObject *pixels = model ? pixel_array(object, &model->vit.config) : NULL;
    if (!pixels)
        return NULL;
    npy_intp pictures = PyArray_DIM(pixels, 0);
    npy_intp shape[] = {pictures, model->qformer.config.num_query_tokens, model->lm->config.hidden_size};
    b2_encoded out = {0};
    PyObject *features = new_float_array(3, shape, &out.features);
    if (features) {
        run r;
        run_begin(&r, self, NULL);
        int status = b2_blip2_encode(&r.ctx, model, &out, PyArray_DATA(pixels), pictures, &r.err);
        if (run_end(&r, self, status) < 0)
            Py_CLEAR(features);
    }
    Py_DECREF(pixels);
    return features;
}

/* The arrays and recorders of encode_stages. */
typedef struct stages {
    PyObject *vision, *pooled, *qformer, *features;
    recorder taps[2];
    int recording;
} stages;

static void stages_release(stages *s)
{
    Py_XDECREF(s->vision);
    Py_XDECREF(s->pooled);
    Py_XDECREF(s->qformer);
    Py_XDECREF(s->features);
    recorder_release(&s->taps[0]);
    recorder_release(&s->taps[1]);
}

static int stages_make(stages *s, b2_encoded *out, b2py_state *state, const b2_blip2 *model, npy_intp pictures,
                       int hidden_states)
{
    npy_intp vision[] = {pictures, b2_vit_tokens(&model->vit.config), model->vit.config.hidden_size};
    npy_intp pooled[] = {pictures, model->vit.config.hidden_size};
    npy_intp qformer[] = {pictures, model->qformer.config.num_query_tokens, model->qformer.config.hidden_size};
    npy_intp features[] = {pictures, model->qformer.config.num_query_tokens, model->lm->config.hidden_size};
    *s = (stages){.recording = hidden_states};
    s->vision = new_float_array(3, vision, &out->vision);
    s->pooled = new_float_array(2, pooled, &out->pooled);
    s->qformer = new_float_array(3, qformer, &out->qformer);
    s->features = new_float_array(3, features, &out->features);
    if (!s->vision || !s->pooled || !s->qformer || !s->features)
        return -1;
    if (!hidden_states)
        return 0;
    if (recorder_make(&s->taps[0], state, "vision", model->vit.config.num_hidden_layers, 3, vision) < 0 ||
        recorder_make(&s->taps[1], state, "qformer", model->qformer.config.num_hidden_layers, 3, qformer) < 0)
        return -1;
    s->taps[0].next = &s->taps[1];
    return 0;
}

static PyObject *stages_result(const stages *s)
{
    PyObject *result = Py_BuildValue("{s:O,s:O,s:O,s:O}", "vision", s->vision, "pooled", s->pooled, "qformer", s->qformer,
                                     "image_features", s->features);
    if (result && s->recording &&
        (PyDict_SetItemString(result, "vision_hidden_states", s->taps[0].arrays) < 0 ||
         PyDict_SetItemString(result, "qformer_hidden_states", s->taps[1].arrays) < 0))
        Py_CLEAR(result);
    return result;
}

static PyObject *model_encode_stages(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pixel_values", "hidden_states", NULL};
    const b2_blip2 *model = loaded_model(self);
    PyObject *object;
    int hidden_states = 0;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|p", names, &object, &hidden_states))
        return NULL;
    PyArrayObject *pixels = pixel_array(object, &model->vit.config);
    if (!pixels)
        return NULL;
    stages s;
    b2_encoded out = {0};
    npy_intp pictures = PyArray_DIM(pixels, 0);
    int status = stages_make(&s, &out, state_of(self), model, pictures, hidden_states);
    if (status == 0) {
        run r;
        run_begin(&r, self, hidden_states ? &s.taps[0].tap : NULL);
        status = run_end(&r, self, b2_blip2_encode(&r.ctx, model, &out, PyArray_DATA(pixels), pictures, &r.err));
    }
    PyObject *result = status == 0 ? stages_result(&s) : NULL;
    stages_release(&s);
    Py_DECREF(pixels);
    return result;
}

/* The arrays behind a b2_rows_in. */
typedef struct rows_arrays {
    PyArrayObject *features, *ids, *offsets, *mask;
} rows_arrays;

static void rows_release(rows_arrays *a)
{
    Py_XDECREF(a->features);
    Py_XDECREF(a->ids);
    Py_XDECREF(a->offsets);
    Py_XDECREF(a->mask);
}

static int read_features(rows_arrays *a, b2_rows_in *in, PyObject *object, const b2_blip2 *model)
{
    int64_t queries = model->qformer.config.num_query_tokens, width = model->lm->config.hidden_size;
    if (object == Py_None)
        return 0;
    if (!(a->features = b2py_array(object, "image_features", NPY_FLOAT32, 3)))
        return -1;
    npy_intp *shape = PyArray_DIMS(a->features);
    if (shape[0] != in->rows || shape[1] != queries || shape[2] != width) {
        PyErr_Format(PyExc_ValueError, "image_features: expected shape [%lld, %lld, %lld], found [%zd, %zd, %zd]",
                     (long long)in->rows, (long long)queries, (long long)width, shape[0], shape[1], shape[2]);
        return -1;
    }
    in->features = b2_tensor_of(PyArray_DATA(a->features), in->rows * queries, width);
    return 0;
}

static int check_offsets(const b2_rows_in *in, npy_intp tokens)
{
    for (int64_t b = 0; b < in->rows; b++)
        if (in->offsets[b] < 0 || in->offsets[b] > in->offsets[b + 1]) {
            PyErr_Format(PyExc_ValueError, "offsets: not ascending at row %lld", (long long)b);
            return -1;
        }
    if (in->offsets[in->rows] == tokens)
        return 0;
    PyErr_Format(PyExc_ValueError, "offsets: the last is %lld, expected the number of ids %zd",
                 (long long)in->offsets[in->rows], tokens);
    return -1;
}

static int read_rows(rows_arrays *a, b2_rows_in *in, const b2_blip2 *model, PyObject *features, PyObject *ids,
                     PyObject *offsets, PyObject *mask)
{
    *a = (rows_arrays){0};
    *in = (b2_rows_in){0};
    if (!(a->ids = b2py_array(ids, "ids", NPY_INT32, 1)) || !(a->offsets = b2py_array(offsets, "offsets", NPY_INT64, 1)))
        return -1;
    if (PyArray_DIM(a->offsets, 0) < 1) {
        PyErr_SetString(PyExc_ValueError, "offsets: expected at least one entry");
        return -1;
    }
    in->rows = PyArray_DIM(a->offsets, 0) - 1;
    in->ids = PyArray_DATA(a->ids);
    in->offsets = PyArray_DATA(a->offsets);
    if (check_offsets(in, PyArray_DIM(a->ids, 0)) < 0 || read_features(a, in, features, model) < 0)
        return -1;
    if (mask == Py_None)
        return 0;
    if (!(a->mask = b2py_array(mask, "mask", NPY_UINT8, 1)))
        return -1;
    if (PyArray_DIM(a->mask, 0) != PyArray_DIM(a->ids, 0)) {
        PyErr_Format(PyExc_ValueError, "mask: expected %zd entries, found %zd", PyArray_DIM(a->ids, 0),
                     PyArray_DIM(a->mask, 0));
        return -1;
    }
    in->mask = PyArray_DATA(a->mask);
    return 0;
}

static PyObject *run_forward(PyObject *self, const b2_blip2 *model, const b2_rows_in *in, int hidden_states)
{
    npy_intp tokens = in->offsets[in->rows];
    npy_intp shape[] = {tokens, model->lm->config.vocab_size}, hidden[] = {tokens, model->lm->config.hidden_size};
    recorder tap = {0};
    if (hidden_states && recorder_make(&tap, state_of(self), "language_model", model->lm->config.num_hidden_layers, 2,
                                       hidden) < 0)
        return NULL;
    b2_tensor view;
    PyObject *logits = new_float_array(2, shape, &view), *result = NULL;
    if (logits) {
        run r;
        run_begin(&r, self, hidden_states ? &tap.tap : NULL);
        int status = b2_session_forward(&r.ctx, model, in, view, &r.err);
        if (run_end(&r, self, status) == 0)
            result = Py_BuildValue("{s:O}", "logits", logits);
    }
    if (result && hidden_states && PyDict_SetItemString(result, "hidden_states", tap.arrays) < 0)
        Py_CLEAR(result);
    Py_XDECREF(logits);
    recorder_release(&tap);
    return result;
}

static PyObject *model_forward(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image_features", "ids", "offsets", "mask", "hidden_states", NULL};
    const b2_blip2 *model = loaded_model(self);
    PyObject *features, *ids, *offsets, *mask = Py_None;
    int hidden_states = 0;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|Op", names, &features, &ids, &offsets, &mask,
                                               &hidden_states))
        return NULL;
    rows_arrays arrays;
    b2_rows_in in;
    PyObject *result = NULL;
    if (read_rows(&arrays, &in, model, features, ids, offsets, mask) == 0)
        result = run_forward(self, model, &in, hidden_states);
    rows_release(&arrays);
    return result;
}

static PyObject *run_generate(PyObject *self, const b2_blip2 *model, const b2_rows_in *in, const int32_t *rule_ids,
                              const b2_generate_opts *opts)
{
    b2_generated out = {0};
    b2_session_stats stats = {0};
    run r;
    run_begin(&r, self, NULL);
    int status = b2_session_generate(&r.ctx, model, in, rule_ids, opts, &out, &stats, &r.err);
    PyObject *result = run_end(&r, self, status) == 0 ? b2py_generated_dict(&out) : NULL;
    b2_generated_release(&out);
    PyObject *bytes = result ? PyLong_FromLongLong(stats.kv_bytes) : NULL;
    PyObject *allocations = bytes ? PyLong_FromLongLong(stats.step_allocations) : NULL;
    if (result && (!allocations || PyDict_SetItemString(result, "kv_bytes", bytes) < 0 ||
                   PyDict_SetItemString(result, "step_allocations", allocations) < 0))
        Py_CLEAR(result);
    Py_XDECREF(bytes);
    Py_XDECREF(allocations);
    return result;
}

static PyObject *model_generate(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image_features", "ids", "offsets", "mask", "rule_ids", "options", NULL};
    const b2_blip2 *model = loaded_model(self);
    PyObject *features, *ids, *offsets, *mask, *rules, *options;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO", names, &features, &ids, &offsets, &mask, &rules,
                                               &options))
        return NULL;
    rows_arrays arrays;
    b2_rows_in in;
    b2_generate_opts opts;
    b2py_options_storage storage = {0};
    b2_err err = {0};
    PyObject *result = NULL;
    PyArrayObject *rule_ids = NULL;
    if (read_rows(&arrays, &in, model, features, ids, offsets, mask) == 0 &&
        (rule_ids = b2py_array(rules, "rule_ids", NPY_INT32, 1))) {
        if (b2py_parse_options(options, &opts, &storage, &err) < 0)
            b2py_raise(state_of(self), &err);
        else if (PyArray_DIM(rule_ids, 0) != PyArray_DIM(arrays.ids, 0))
            PyErr_Format(PyExc_ValueError, "rule_ids: expected %zd entries, found %zd", PyArray_DIM(arrays.ids, 0),
                         PyArray_DIM(rule_ids, 0));
        else
            result = run_generate(self, model, &in, PyArray_DATA(rule_ids), &opts);
    }
    b2py_options_release(&storage);
    Py_XDECREF(rule_ids);
    rows_release(&arrays);
    return result;
}

/* ---- what it holds ---- */

typedef struct dict_visitor {
    b2_weight_visitor visitor;
    PyObject *dict;
} dict_visitor;

static int add_weight(b2_weight_visitor *visitor, const b2_weight *weight, const int64_t *shape, int rank, b2_err *err)
{
    static const int numpy_types[] = {NPY_FLOAT32, NPY_FLOAT16, NPY_UINT16};
    npy_intp dims[4];
    for (int i = 0; i < rank; i++)
        dims[i] = (npy_intp)shape[i];
    PyObject *array = PyArray_SimpleNew(rank, dims, numpy_types[weight->dtype]);
    int status = -1;
    if (!array)
        b2_fail(err, B2_E_CALLBACK, "%s", weight->name);
    else if (b2_weight_unpack(PyArray_DATA((PyArrayObject *)array), weight, err) == 0) {
        status = PyDict_SetItemString(((dict_visitor *)visitor)->dict, weight->name, array);
        if (status < 0)
            b2_fail(err, B2_E_CALLBACK, "%s", weight->name);
    }
    Py_XDECREF(array);
    return status;
}

static PyObject *model_weights(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const b2_blip2 *model = loaded_model(self);
    if (!model)
        return NULL;
    b2_err err = {0};
    dict_visitor visitor = {{add_weight}, PyDict_New()};
    if (!visitor.dict)
        return NULL;
    if (b2_blip2_visit(model, &visitor.visitor, &err) < 0) {
        Py_DECREF(visitor.dict);
        return b2py_raise(state_of(self), &err);
    }
    return visitor.dict;
}

static void append_name(void *owner, const char *name)
{
    PyObject *text = PyUnicode_FromString(name);
    if (text)
        PyList_Append(owner, text);
    Py_XDECREF(text);
}

static PyObject *model_unexpected(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = loaded_model(self);
    PyObject *names = model ? PyList_New(0) : NULL;
    if (names)
        b2_checkpoint_unused(&model->checkpoint, append_name, names);
    if (PyErr_Occurred())
        Py_CLEAR(names);
    return names;
}

static PyObject *model_dtype(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = loaded_model(self);
    return model ? PyUnicode_FromString(b2py_dtype_name(model->dtype)) : NULL;
}

static PyObject *model_nbytes(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_blip2 *model = loaded_model(self);
    return model ? PyLong_FromLongLong(model->bytes) : NULL;
}

static PyObject *model_vision(PyObject *self, PyObject *object)
{
    const b2_blip2 *model = loaded_model(self);
    PyArrayObject *pixels = model ? pixel_array(object, &model->vit.config) : NULL;
    if (!pixels)
        return NULL;
    npy_intp pictures = PyArray_DIM(pixels, 0);
    npy_intp shape[] = {pictures, b2_vit_tokens(&model->vit.config), model->vit.config.hidden_size};
    b2_encoded out = {0};
    PyObject *hidden = new_float_array(3, shape, &out.vision);
    if (hidden) {
        run r;
        run_begin(&r, self, NULL);
        int status = b2_blip2_encode(&r.ctx, model, &out, PyArray_DATA(pixels), pictures, &r.err);
        if (run_end(&r, self, status) < 0)
            Py_CLEAR(hidden);
    }
    Py_DECREF(pixels);
    return hidden;
}

static PyArrayObject *embeds_array(PyObject *object, const b2_blip2 *model)
{
    PyArrayObject *embeds = b2py_array(object, "image_embeds", NPY_FLOAT32, 3);
    if (!embeds)
        return NULL;
    int64_t tokens = b2_vit_tokens(&model->vit.config), width = model->vit.config.hidden_size;
    npy_intp *shape = PyArray_DIMS(embeds);
    if (shape[1] == tokens && shape[2] == width)
        return embeds;
    PyErr_Format(PyExc_ValueError, "image_embeds: expected shape [batch, %lld, %lld], found [%zd, %zd, %zd]",
                 (long long)tokens, (long long)width, shape[0], shape[1], shape[2]);
    Py_DECREF(embeds);
    return NULL;
}

static PyObject *model_read(PyObject *self, PyObject *object)
{
    const b2_blip2 *model = loaded_model(self);
    PyArrayObject *embeds = model ? embeds_array(object, model) : NULL;
    if (!embeds)
        return NULL;
    npy_intp *given = PyArray_DIMS(embeds);
    npy_intp shape[] = {given[0], model->qformer.config.num_query_tokens, model->lm->config.hidden_size};
    b2_encoded out = {.vision = b2_tensor_of(PyArray_DATA(embeds), given[0] * given[1], given[2])};
    PyObject *features = new_float_array(3, shape, &out.features);
    if (features) {
        run r;
        run_begin(&r, self, NULL);
        int status = b2_blip2_encode(&r.ctx, model, &out, NULL, given[0], &r.err);
        if (run_end(&r, self, status) < 0)
            Py_CLEAR(features);
    }
    Py_DECREF(embeds);
    return features;
}

static PyMethodDef model_methods[] = {
    {"read", model_read, METH_O, "read(image_embeds) -> image features [B, Q, D]: Q-Former and projection alone"},
    {"vision", model_vision, METH_O, "vision(pixel_values) -> last hidden state of the vision encoder [B, T, D]"},
    {"encode", model_encode, METH_O, "encode(pixel_values) -> image features [B, Q, D]"},
    {"encode_stages", (PyCFunction)(void (*)(void))model_encode_stages, METH_VARARGS | METH_KEYWORDS,
     "encode_stages(pixel_values, hidden_states=False) -> dict of every stage's output"},
    {"forward", (PyCFunction)(void (*)(void))model_forward, METH_VARARGS | METH_KEYWORDS,
     "forward(image_features, ids, offsets, mask=None, hidden_states=False) -> {\"logits\": [N, V]}"},
    {"generate", (PyCFunction)(void (*)(void))model_generate, METH_VARARGS | METH_KEYWORDS,
     "generate(image_features, ids, offsets, mask, rule_ids, options) -> dict"},
    {"weights", model_weights, METH_NOARGS, "weights() -> every weight by its checkpoint name, unpacked"},
    {0},
};

static PyGetSetDef model_getset[] = {
    {"unexpected", model_unexpected, NULL, "Names in the files that this architecture does not have.", NULL},
    {"dtype", model_dtype, NULL, "How most of the weights are held.", NULL},
    {"nbytes", model_nbytes, NULL, "Bytes of all weights as held.", NULL},
    {0},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, "Immutable weights and the computations on them; may be shared by threads."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, model_init},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_getset},
    {0, NULL},
};

static PyType_Spec model_spec = {
    .name = "blip2c._core.Model",
    .basicsize = sizeof(model_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};

int b2py_add_model(PyObject *module)
{
    b2py_state *state = b2py_state_of_module(module);
    state->model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    return state->model_type ? PyModule_AddType(module, state->model_type) : -1;
}
