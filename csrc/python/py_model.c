/* blip2c._core.Model: its life and what it holds. */
#include "python/py_model.h"

#include <string.h>

#include "core/memory.h"
#include "python/py_config.h"
#include "python/py_device.h"
#include "python/py_dtype.h"

typedef struct model_object {
    PyObject_HEAD
    b2_blip2 model;
    const b2_backend *backend; /* NULL: the processor */
    b2_device *device;         /* owned; where the weights are */
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

/* Where a computation runs: a device with a queue of its own, or the processor (device NULL). */
static int lane_open(b2py_lane *lane, b2_ctx *ctx, const b2py_state *state, const b2_backend *backend, b2_device *device,
                     b2_err *err)
{
    *lane = (b2py_lane){.backend = backend};
    *ctx = (b2_ctx){.ops = state->ops, .pool = state->pool, .scratch = &lane->arena, .activations = &lane->arena,
                    .rows_are = B2_ROWS_TOGETHER};
    if (!device)
        return 0;
    if (!(ctx->queue = lane->queue = backend->queue(device, err)))
        return -1;
    lane->device_arena.memory = device->memory;
    ctx->ops = device->ops;
    ctx->memory = device->memory;
    ctx->activations = &lane->device_arena;
    return 0;
}

/* The queue first: it waits for what uses the arenas. */
static void lane_close(b2py_lane *lane)
{
    if (lane->queue)
        lane->backend->release(lane->queue);
    b2_arena_release(&lane->arena);
    b2_arena_release(&lane->device_arena);
}

/* What load() asks for and fills. */
typedef struct loading {
    const b2_blip2_config *config;
    const b2_dtype_policy *policies; /* [B2_PART_COUNT] */
    int index;                       /* of the device; -1: none */
    const b2_backend *backend;
    b2_device *device;
    b2_blip2 model;
} loading;

static int prepare(const b2py_state *state, loading *l, b2_cancel *cancel, b2_err *err)
{
    b2py_lane lane;
    b2_ctx ctx;
    int status = lane_open(&lane, &ctx, state, l->backend, l->device, err);
    ctx.cancel = cancel;
    ctx.rows_are = B2_ROWS_COUNTED;
    if (status == 0)
        status = b2_blip2_prepare(&ctx, &l->model, err);
    lane_close(&lane);
    return status;
}

static void loading_undo(loading *l)
{
    b2_blip2_release(&l->model);
    if (l->device)
        l->backend->close(l->device);
    l->device = NULL;
}

/* Without the GIL. */
static int load_all(const b2py_state *state, loading *l, const char **paths, Py_ssize_t count, b2_cancel *cancel,
                    b2_err *err)
{
    if (l->backend && !(l->device = l->backend->open(l->index, err)))
        return -1;
    int status = b2_blip2_load(&l->model, l->config, paths, count, l->policies, l->device ? l->device->memory : NULL,
                               state->pool, cancel, err);
    if (status == 0)
        status = prepare(state, l, cancel, err);
    if (status < 0)
        loading_undo(l);
    return status;
}

static int load(model_object *self, loading *l, PyObject *path_list)
{
    b2py_state *state = state_of((PyObject *)self);
    b2_err err = {0};
    Py_ssize_t count = PySequence_Fast_GET_SIZE(path_list);
    const char **paths = b2_alloc((size_t)count, sizeof *paths, "paths", &err);
    if (!paths || (l->index >= 0 && !(l->backend = b2py_backend(state, &err)))) {
        b2_free(paths);
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
    b2py_call call;
    b2_cancel *cancel = b2py_call_begin(&call);
    int status = load_all(state, l, paths, count, cancel, &err);
    b2py_call_end(&call);
    b2_free(paths);
    if (status < 0) {
        b2py_raise(state, &err);
    } else if ((status = refuse_second_load(self)) < 0) { /* another thread's came first */
        loading_undo(l);
    } else {
        self->model = l->model;
        self->backend = l->backend;
        self->device = l->device;
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
    static char *names[] = {"paths", "config", "dtype", "device", NULL};
    model_object *self = (model_object *)object;
    b2py_state *state = state_of(object);
    PyObject *paths, *config, *dtype = NULL;
    const char *device = "cpu";
    b2_dtype_policy policies[B2_PART_COUNT] = {0};
    b2_blip2_config parsed = {0};
    if (refuse_second_load(self) < 0 ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|Os", names, &paths, &config, &dtype, &device) ||
        (dtype && b2py_read_policies(state, dtype, policies) < 0) || b2py_read_config(state, config, &parsed) < 0)
        return -1;
    loading l = {.config = &parsed, .policies = policies};
    PyObject *encoded = b2py_read_device(&l.index, device) == 0 ? encode_paths(paths) : NULL;
    int status = encoded ? load(self, &l, encoded) : -1;
    Py_XDECREF(encoded);
    return status;
}

static void model_dealloc(PyObject *object)
{
    model_object *self = (model_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->loaded)
        b2_blip2_release(&self->model);
    if (self->device)
        self->backend->close(self->device);
    type->tp_free(object);
    Py_DECREF(type);
}

const b2_blip2 *b2py_loaded_model(PyObject *object)
{
    model_object *self = (model_object *)object;
    if (self->loaded)
        return &self->model;
    PyErr_SetString(PyExc_RuntimeError, "Model: not loaded");
    return NULL;
}

const b2_blip2 *b2py_language_model(PyObject *object)
{
    const b2_blip2 *model = b2py_loaded_model(object);
    if (!model || model->lm)
        return model;
    PyErr_SetString(state_of(object)->unsupported_error, "this model has no language model");
    return NULL;
}

b2py_place b2py_model_place(PyObject *self)
{
    const model_object *model = (model_object *)self;
    return (b2py_place){model->backend, model->device};
}

/* ---- running ---- */

static int run_begin(b2py_run *r, PyObject *self, b2_device *device, b2_tap *tap)
{
    b2py_state *state = state_of(self);
    *r = (b2py_run){0};
    b2_cancel *cancel = b2py_call_begin_listed(&r->call, state);
    int status = lane_open(&r->lane, &r->ctx, state, ((model_object *)self)->backend, device, &r->err);
    r->ctx.cancel = cancel;
    r->ctx.tap = tap;
    return status < 0 ? b2py_run_end(r, self, -1) : 0;
}

int b2py_run_begin(b2py_run *r, PyObject *self, b2_tap *tap)
{
    return run_begin(r, self, ((model_object *)self)->device, tap);
}

int b2py_run_begin_on_host(b2py_run *r, PyObject *self)
{
    return run_begin(r, self, NULL, NULL);
}

int b2py_note_given(b2py_run *r, const char *name, PyArrayObject *array)
{
    if (!array || !b2py_is_on_device(array) || PyArray_SIZE(array) == 0)
        return 0;
    npy_intp rows = PyArray_DIM(array, 0);
    return b2_note_finite(&r->ctx, name, B2_GIVEN, b2_tensor_of(PyArray_DATA(array), rows, PyArray_SIZE(array) / rows),
                          &r->err);
}

int b2py_run_end(b2py_run *r, PyObject *self, int status)
{
    if (status == 0)
        status = b2_finish(&r->ctx, &r->err);
    lane_close(&r->lane);
    b2py_call_end(&r->call);
    b2py_call_unlist(state_of(self), &r->call);
    if (status < 0)
        b2py_raise(state_of(self), &r->err);
    return status;
}

void b2py_rows_release(b2py_rows *a)
{
    Py_XDECREF(a->features);
    Py_XDECREF(a->ids);
    Py_XDECREF(a->offsets);
    Py_XDECREF(a->mask);
    Py_XDECREF(a->decoder_ids);
    Py_XDECREF(a->decoder_offsets);
    Py_XDECREF(a->decoder_mask);
}

static int read_features(b2py_rows *a, b2_rows_in *in, PyObject *object, PyObject *self)
{
    b2py_state *state = state_of(self);
    const b2_blip2 *model = &((model_object *)self)->model;
    b2py_place place = b2py_model_place(self);
    int64_t width = model->lm->config.hidden_size;
    if (!object || object == Py_None)
        return 0;
    if (!(a->features = b2py_floats(state, object, "image_features", 3, place)))
        return -1;
    npy_intp *shape = PyArray_DIMS(a->features);
    if (shape[0] != in->rows || shape[1] < 1 || shape[2] != width) {
        PyErr_Format(PyExc_ValueError, "image_features: expected shape [%lld, places, %lld], found [%zd, %zd, %zd]",
                     (long long)in->rows, (long long)width, shape[0], shape[1], shape[2]);
        return -1;
    }
    in->features = b2_tensor_of(PyArray_DATA(a->features), in->rows * shape[1], width);
    return 0;
}

/* One list of packed rows: its arrays and whether they fit each other. `prefix` is "" or "decoder_". */
static int read_packed(const char *prefix, PyArrayObject **ids, PyArrayObject **offsets, PyArrayObject **mask,
                       PyObject *ids_object, PyObject *offsets_object, PyObject *mask_object)
{
    char name[32];
    PyOS_snprintf(name, sizeof name, "%sids", prefix);
    if (!(*ids = b2py_array(ids_object, name, NPY_INT32, 1)))
        return -1;
    PyOS_snprintf(name, sizeof name, "%soffsets", prefix);
    if (!(*offsets = b2py_array(offsets_object, name, NPY_INT64, 1)))
        return -1;
    npy_intp tokens = PyArray_DIM(*ids, 0), rows = PyArray_DIM(*offsets, 0) - 1;
    const int64_t *offset = PyArray_DATA(*offsets);
    if (rows < 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected at least one entry", name);
        return -1;
    }
    for (npy_intp b = 0; b < rows; b++)
        if (offset[b] < 0 || offset[b] > offset[b + 1]) {
            PyErr_Format(PyExc_ValueError, "%s: not ascending at row %zd", name, b);
            return -1;
        }
    if (offset[rows] != tokens) {
        PyErr_Format(PyExc_ValueError, "%s: the last is %lld, expected the number of ids %zd", name,
                     (long long)offset[rows], tokens);
        return -1;
    }
    if (!mask_object || mask_object == Py_None)
        return 0;
    PyOS_snprintf(name, sizeof name, "%smask", prefix);
    if (!(*mask = b2py_array(mask_object, name, NPY_UINT8, 1)))
        return -1;
    if (PyArray_DIM(*mask, 0) == tokens)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %zd entries, found %zd", name, tokens, PyArray_DIM(*mask, 0));
    return -1;
}

/* The decoder's rows beside the prompts: an encoder-decoder needs them, another model has none. */
static int read_decoder_rows(b2py_rows *a, b2_rows_in *in, const b2_blip2 *model, const b2py_row_objects *o)
{
    int given = o->decoder_ids && o->decoder_ids != Py_None, needed = model->lm->class_->encode != NULL;
    if (given != needed) {
        PyErr_Format(PyExc_ValueError, "decoder_ids: %s", needed ? "an encoder-decoder needs them"
                                                                 : "this language model has no decoder of its own");
        return -1;
    }
    if (!given)
        return 0;
    if (read_packed("decoder_", &a->decoder_ids, &a->decoder_offsets, &a->decoder_mask, o->decoder_ids,
                    o->decoder_offsets ? o->decoder_offsets : Py_None, o->decoder_mask) < 0)
        return -1;
    if (PyArray_DIM(a->decoder_offsets, 0) - 1 != in->rows) {
        PyErr_Format(PyExc_ValueError, "decoder_offsets: expected %lld rows, found %zd", (long long)in->rows,
                     PyArray_DIM(a->decoder_offsets, 0) - 1);
        return -1;
    }
    in->decoder_ids = PyArray_DATA(a->decoder_ids);
    in->decoder_offsets = PyArray_DATA(a->decoder_offsets);
    in->decoder_mask = a->decoder_mask ? PyArray_DATA(a->decoder_mask) : NULL;
    return 0;
}

int b2py_read_rows(b2py_rows *a, b2_rows_in *in, PyObject *self, const b2py_row_objects *o)
{
    const b2_blip2 *model = &((model_object *)self)->model;
    *a = (b2py_rows){0};
    *in = (b2_rows_in){0};
    if (read_packed("", &a->ids, &a->offsets, &a->mask, o->ids, o->offsets, o->mask) < 0)
        return -1;
    in->rows = PyArray_DIM(a->offsets, 0) - 1;
    in->ids = PyArray_DATA(a->ids);
    in->offsets = PyArray_DATA(a->offsets);
    in->mask = a->mask ? PyArray_DATA(a->mask) : NULL;
    return read_features(a, in, o->features, self) < 0 || read_decoder_rows(a, in, model, o) < 0 ? -1 : 0;
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
    const b2_blip2 *model = b2py_loaded_model(self);
    PyObject *names = model ? PyList_New(0) : NULL;
    if (names)
        b2_checkpoint_unused(&model->checkpoint, append_name, names);
    if (PyErr_Occurred())
        Py_CLEAR(names);
    return names;
}

static PyObject *model_device(PyObject *self, void *Py_UNUSED(closure))
{
    const b2_device *device = ((model_object *)self)->device;
    return device ? PyUnicode_FromFormat("cuda:%d", device->index) : PyUnicode_FromString("cpu");
}

/* The model's device; without one NULL with the exception set. */
static int placed(b2py_place *place, PyObject *self, const char *what)
{
    *place = b2py_model_place(self);
    if (!place->device)
        PyErr_Format(PyExc_ValueError, "%s: this model is on the processor", what);
    return place->device ? 0 : -1;
}

static PyObject *model_take(PyObject *self, PyObject *args)
{
    PyObject *object;
    const char *name;
    b2py_place place;
    if (!b2py_loaded_model(self) || !PyArg_ParseTuple(args, "Os", &object, &name) || placed(&place, self, name) < 0)
        return NULL;
    return b2py_take(state_of(self), object, name, place);
}

static PyObject *model_put(PyObject *self, PyObject *object)
{
    b2py_place place;
    if (!b2py_loaded_model(self) || placed(&place, self, "put") < 0)
        return NULL;
    PyArrayObject *array = b2py_array(object, "array", NPY_FLOAT32, -1), *there = NULL;
    if (array)
        there = b2py_to_place(state_of(self), array, place);
    Py_XDECREF(array);
    return b2py_give(state_of(self), (PyObject *)there);
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef model_methods[] = {
    {"encode", KEYWORDS(b2py_model_encode),
     "encode(pixel_values, interpolate=False, text=None, on_device=False) -> image features [B, Q, D]"},
    {"vision", KEYWORDS(b2py_model_vision),
     "vision(pixel_values, on_device=False) -> last hidden state of the vision encoder [B, T, D]"},
    {"read", KEYWORDS(b2py_model_read),
     "read(image_embeds, text=None, on_device=False) -> image features [B, Q, D]: Q-Former and projection alone"},
    {"encode_stages", KEYWORDS(b2py_model_encode_stages),
     "encode_stages(pixel_values=None, hidden_states=False, attentions=False, interpolate=False, image_embeds=None,"
     " qformer=True, text=None, on_device=False) -> dict of every stage's output"},
    {"read_texts", KEYWORDS(b2py_model_read_texts),
     "read_texts(text, hidden_states=False, attentions=False, on_device=False) -> dict: texts through the Q-Former alone"},
    {"run_qformer", KEYWORDS(b2py_model_run_qformer),
     "run_qformer(queries, text=None, query_mask=None, text_mask=None, image_embeds=None, image_mask=None,"
     " hidden_states=False, attentions=False, sees=\"all\", on_device=False) -> dict: the Q-Former on any embeddings"},
    {"match", b2py_model_match, METH_VARARGS,
     "match(image_embeds, text, picture_of) -> [N, 2]: logits of whether texts belong to pictures"},
    {"similarity", b2py_model_similarity, METH_VARARGS,
     "similarity(images, texts) -> [I, J]: the largest cosine of a query of picture i with text j"},
    {"forward", KEYWORDS(b2py_model_forward),
     "forward(image_features, ids, offsets, mask=None, hidden_states=False, attentions=False, decoder_ids=None,"
     " decoder_offsets=None, decoder_mask=None, on_device=False) -> {\"logits\": [N, V]}"},
    {"project", KEYWORDS(b2py_model_project), "project(x, on_device=False) -> language_projection of x [N, Dq]"},
    {"embed", KEYWORDS(b2py_model_embed), "embed(ids, on_device=False) -> token embeddings [N, D]"},
    {"generate", KEYWORDS(b2py_model_generate),
     "generate(image_features, ids, offsets, mask, rule_ids, options, decoder_ids=None, decoder_offsets=None,"
     " decoder_mask=None, prefixes=None, keys=None, hooks=None, tap=None, tap_weights=False,"
     " keep=False) -> dict"},
    {"generate_stream", KEYWORDS(b2py_model_generate_stream),
     "generate_stream(next, done, options, places, longest, longest_decoder=0, masked=False) -> dict"},
    {"prefill", KEYWORDS(b2py_model_prefill), "prefill(image_features, ids, rule_ids, prefix=None) -> Prefix"},
    {"take", model_take, METH_VARARGS,
     "take(array, name) -> DeviceArray: what lies on the model's device and has __dlpack__, where it lies where it can be"},
    {"put", model_put, METH_O, "put(array) -> DeviceArray: a copy on the model's device"},
    {"weights", KEYWORDS(b2py_model_weights), "weights(only=None) -> weights by their checkpoint names, unpacked"},
    {"weight_names", b2py_model_weight_names, METH_NOARGS, "weight_names() -> list of checkpoint names"},
    {"save_packed", b2py_model_save_packed, METH_VARARGS,
     "save_packed(path, metadata): all weights as they are held, in one file"},
    {0},
};

static PyGetSetDef model_getset[] = {
    {"unexpected", model_unexpected, NULL, "Names in the files that this architecture does not have.", NULL},
    {"device", model_device, NULL, "Where the weights are and what is computed with them: \"cpu\", \"cuda:0\" ...", NULL},
    {"dtype", b2py_model_dtype, NULL, "How most of the weights are held.", NULL},
    {"dtypes", b2py_model_dtypes, NULL, "The same for each part.", NULL},
    {"policies", b2py_model_policies, NULL, "What was asked for, or what the packed file was made for.", NULL},
    {"parameters", b2py_model_parameters, NULL, "Elements of all weights.", NULL},
    {"nbytes", b2py_model_nbytes, NULL, "Bytes of all weights as held.", NULL},
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
