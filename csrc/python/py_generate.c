/* Model.generate, Model.prefill and the Prefix type. */
#include "python/py_model.h"

#include <string.h>

#include "core/memory.h"
#include "python/py_hooks.h"
#include "python/py_search.h"

/* ---- Prefix ---- */

typedef struct prefix_object {
    PyObject_HEAD
    b2_prefix *prefix;
    PyObject *model; /* whose it is: as long as it lives, no other model can be taken for it */
} prefix_object;

/* Takes over the reference to `prefix`, also on failure. */
static PyObject *new_prefix(PyObject *model, b2_prefix *prefix)
{
    PyTypeObject *type = b2py_state_of_type(Py_TYPE(model))->prefix_type;
    prefix_object *self = (prefix_object *)type->tp_alloc(type, 0);
    if (!self) {
        b2_prefix_release(prefix);
        return NULL;
    }
    self->prefix = prefix;
    self->model = Py_NewRef(model);
    return (PyObject *)self;
}

static void prefix_dealloc(PyObject *object)
{
    prefix_object *self = (prefix_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    b2_prefix_release(self->prefix);
    Py_XDECREF(self->model);
    type->tp_free(object);
    Py_DECREF(type);
}

static Py_ssize_t prefix_length(PyObject *object)
{
    return (Py_ssize_t)((prefix_object *)object)->prefix->length;
}

static PyObject *ids_of(const int32_t *ids, int64_t length)
{
    npy_intp shape = length;
    PyObject *array = PyArray_SimpleNew(1, &shape, NPY_INT32);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), ids, (size_t)length * sizeof *ids);
    return array;
}

static PyObject *prefix_ids(PyObject *object, void *Py_UNUSED(closure))
{
    const b2_prefix *prefix = ((prefix_object *)object)->prefix;
    return ids_of(prefix->ids, prefix->length);
}

static PyObject *prefix_rule_ids(PyObject *object, void *Py_UNUSED(closure))
{
    const b2_prefix *prefix = ((prefix_object *)object)->prefix;
    return ids_of(prefix->rule_ids, prefix->length);
}

static PyObject *prefix_nbytes(PyObject *object, void *Py_UNUSED(closure))
{
    const b2_kv_cache *cache = &((prefix_object *)object)->prefix->cache;
    return PyLong_FromLongLong(cache->rows * b2_kv_cache_row_bytes(cache));
}

static PyObject *prefix_head(PyObject *object, PyObject *argument)
{
    prefix_object *self = (prefix_object *)object;
    int64_t length = PyLong_AsLongLong(argument);
    if (length == -1 && PyErr_Occurred())
        return NULL;
    if (length < 1 || length > self->prefix->length) {
        PyErr_Format(PyExc_ValueError, "length: expected 1 to %lld, found %lld", (long long)self->prefix->length,
                     (long long)length);
        return NULL;
    }
    if (length == self->prefix->length)
        return Py_NewRef(object);
    b2_prefix *head = NULL;
    b2py_run r;
    if (b2py_run_begin(&r, self->model, NULL) < 0)
        return NULL;
    int status = b2_prefix_head(&head, &r.ctx, self->prefix, length, &r.err);
    return b2py_run_end(&r, self->model, status) < 0 ? NULL : new_prefix(self->model, head);
}

static PyMethodDef prefix_methods[] = {
    {"head", prefix_head, METH_O, "head(length) -> Prefix: its first tokens."},
    {0},
};

static PyGetSetDef prefix_getset[] = {
    {"ids", prefix_ids, NULL, "int32 [len(self)]: what the model has read; -1 where an image feature stands.", NULL},
    {"rule_ids", prefix_rule_ids, NULL, "int32 [len(self)]: the same as the rules of generation see it.", NULL},
    {"nbytes", prefix_nbytes, NULL, "Bytes of its keys and values.", NULL},
    {0},
};

static PyType_Slot prefix_slots[] = {
    {Py_tp_doc, "A beginning of a prompt that the model has read: immutable, to be shared by any number of prompts."},
    {Py_tp_dealloc, prefix_dealloc},
    {Py_tp_methods, prefix_methods},
    {Py_tp_getset, prefix_getset},
    {Py_sq_length, prefix_length},
    {0, NULL},
};

static PyType_Spec prefix_spec = {
    .name = "blip2c._core.Prefix",
    .basicsize = sizeof(prefix_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = prefix_slots,
};

int b2py_add_prefix(PyObject *module)
{
    b2py_state *state = b2py_state_of_module(module);
    state->prefix_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &prefix_spec, NULL);
    return state->prefix_type ? PyModule_AddType(module, state->prefix_type) : -1;
}

b2_prefix *b2py_prefix_of(PyObject *model, PyObject *object, const char *name)
{
    if (object == Py_None)
        return NULL;
    if (Py_TYPE(object) == b2py_state_of_type(Py_TYPE(model))->prefix_type)
        return ((prefix_object *)object)->prefix;
    PyErr_Format(PyExc_TypeError, "%s: expected a Prefix or None, found %s", name, Py_TYPE(object)->tp_name);
    return NULL;
}

/* ---- prefill ---- */

/* The arrays behind one prompt of prefill(). */
typedef struct prompt_arrays {
    PyArrayObject *features, *ids, *rules;
} prompt_arrays;

static int read_prompt(prompt_arrays *a, b2_prompt *prompt, PyObject *self, PyObject *features, PyObject *ids,
                       PyObject *rules)
{
    const b2_blip2 *model = b2py_loaded_model(self);
    if (!(a->ids = b2py_array(ids, "ids", NPY_INT32, 1)) || !(a->rules = b2py_array(rules, "rule_ids", NPY_INT32, 1)))
        return -1;
    prompt->ids = PyArray_DATA(a->ids);
    prompt->length = PyArray_DIM(a->ids, 0);
    if (PyArray_DIM(a->rules, 0) != prompt->length) {
        PyErr_Format(PyExc_ValueError, "rule_ids: expected %zd entries, found %zd", PyArray_DIM(a->ids, 0),
                     PyArray_DIM(a->rules, 0));
        return -1;
    }
    if (features == Py_None)
        return 0;
    if (!(a->features = b2py_floats(b2py_state_of_type(Py_TYPE(self)), features, "image_features", 2,
                                    b2py_model_place(self))))
        return -1;
    npy_intp places = PyArray_DIM(a->features, 0), width = PyArray_DIM(a->features, 1);
    if (width != model->lm->config.hidden_size || places < 1) {
        PyErr_Format(PyExc_ValueError, "image_features: expected shape [places, %lld], found [%zd, %zd]",
                     (long long)model->lm->config.hidden_size, places, width);
        return -1;
    }
    prompt->features = b2_tensor_of(PyArray_DATA(a->features), places, width);
    return 0;
}

static PyObject *run_prefill(PyObject *self, const b2_blip2 *model, const b2_prompt *prompt, const int32_t *rules)
{
    b2_prefix *prefix = NULL;
    b2py_run r;
    if (b2py_run_begin(&r, self, NULL) < 0)
        return NULL;
    int status = b2_session_prefix(&prefix, &r.ctx, model, prompt, rules, &r.err);
    return b2py_run_end(&r, self, status) < 0 ? NULL : new_prefix(self, prefix);
}

PyObject *b2py_model_prefill(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image_features", "ids", "rule_ids", "prefix", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    PyObject *features, *ids, *rules, *before = Py_None, *result = NULL;
    prompt_arrays arrays = {0};
    b2_prompt prompt = {0};
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|O", names, &features, &ids, &rules, &before))
        return NULL;
    prompt.prefix = b2py_prefix_of(self, before, "prefix");
    if (!PyErr_Occurred() && read_prompt(&arrays, &prompt, self, features, ids, rules) == 0)
        result = run_prefill(self, model, &prompt, PyArray_DATA(arrays.rules));
    Py_XDECREF(arrays.features);
    Py_XDECREF(arrays.ids);
    Py_XDECREF(arrays.rules);
    return result;
}

/* ---- generate ---- */

/* A Python callable that watches hidden states and attention weights step by step. */
typedef struct watcher {
    b2_tap tap; /* first */
    b2py_call *call;
    PyObject *function;
} watcher;

/* Takes over the reference to `array`. The GIL is held on entry and given up. */
static int show(watcher *w, const char *kind, const char *stage, int layer, PyObject *array, b2_err *err)
{
    PyObject *answer = array ? PyObject_CallFunction(w->function, "ssiO", kind, stage, layer, array) : NULL;
    int status = answer ? 0 : b2_fail(err, B2_E_CALLBACK, "tap raised");
    Py_XDECREF(array);
    Py_XDECREF(answer);
    b2py_call_resume(w->call);
    return status;
}

/* A new float32 array; the GIL is given up before and after. NULL with B2_E_CALLBACK. */
static PyObject *array_of(watcher *w, int ndim, npy_intp *shape, float **data, b2_err *err)
{
    b2py_call_hold(w->call);
    PyObject *array = PyArray_SimpleNew(ndim, shape, NPY_FLOAT32);
    b2py_call_resume(w->call);
    if (array)
        *data = PyArray_DATA((PyArrayObject *)array);
    else
        b2_fail(err, B2_E_CALLBACK, "tap");
    return array;
}

/* Shows an array that `status` says is filled. */
static int show_or_drop(watcher *w, int status, const char *kind, const char *stage, int layer, PyObject *array,
                        b2_err *err)
{
    b2py_call_hold(w->call);
    if (status == 0)
        return show(w, kind, stage, layer, array, err);
    Py_DECREF(array);
    b2py_call_resume(w->call);
    return -1;
}

static int watch_hidden(b2_tap *tap, b2_ctx *ctx, const char *stage, int layer, b2_tensor hidden, b2_err *err)
{
    watcher *w = (watcher *)tap;
    npy_intp shape[2] = {hidden.rows, hidden.cols};
    float *to;
    PyObject *array = array_of(w, 2, shape, &to, err);
    if (!array)
        return -1;
    int status = b2_download_rows(ctx, b2_tensor_of(to, hidden.rows, hidden.cols), hidden, err);
    return show_or_drop(w, status, "hidden", stage, layer, array, err);
}

static int watch_attention(b2_tap *tap, b2_ctx *ctx, const char *stage, int layer, const b2_attention_args *args,
                           b2_err *err)
{
    watcher *w = (watcher *)tap;
    npy_intp count = b2py_attention_size(args);
    float *to;
    PyObject *array = array_of(w, 1, &count, &to, err);
    return array ? show_or_drop(w, b2py_attention_weights(ctx, to, args, err), "attention", stage, layer, array, err) : -1;
}

/* What generate() was handed, read and checked. Start from {0}. */
typedef struct request {
    b2py_row_objects objects;
    PyObject *rules, *options, *prefix_list, *key_array, *hook_dict, *tap;
    int keep, tap_weights;
    b2py_rows arrays;
    b2_rows_in in;
    PyArrayObject *rule_ids, *keys;
    PyObject *prefixes;       /* tuple */
    b2_prefix **prefix_of_row;/* [B], owned */
    b2_prefix **kept;         /* [B * num_return_sequences] once the search has begun, owned; entries may be NULL */
    b2_generate_opts opts;
    b2py_options_storage storage;
    b2py_hooks hooks;
} request;

static int64_t kept_count(const request *q)
{
    return q->in.rows * q->opts.num_return_sequences;
}

static void request_release(request *q)
{
    for (int64_t i = 0; q->kept && i < kept_count(q); i++)
        b2_prefix_release(q->kept[i]);
    b2_free(q->kept);
    b2_free(q->prefix_of_row);
    b2py_hooks_release(&q->hooks);
    b2py_options_release(&q->storage);
    Py_XDECREF(q->prefixes);
    Py_XDECREF(q->rule_ids);
    Py_XDECREF(q->keys);
    b2py_rows_release(&q->arrays);
}

static int read_vector(PyArrayObject **array, PyObject *object, const char *name, int type, npy_intp length)
{
    if (!(*array = b2py_array(object, name, type, 1)))
        return -1;
    if (PyArray_DIM(*array, 0) == length)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %zd entries, found %zd", name, length, PyArray_DIM(*array, 0));
    return -1;
}

static int read_prefixes(request *q, PyObject *self, b2_err *err)
{
    if (q->prefix_list == Py_None)
        return 0;
    if (!(q->prefixes = PySequence_Tuple(q->prefix_list)))
        return -1;
    if (PyTuple_GET_SIZE(q->prefixes) != q->in.rows) {
        PyErr_Format(PyExc_ValueError, "prefixes: expected %lld entries, found %zd", (long long)q->in.rows,
                     PyTuple_GET_SIZE(q->prefixes));
        return -1;
    }
    if (!(q->prefix_of_row = b2_alloc((size_t)q->in.rows, sizeof(b2_prefix *), "prefixes", err)))
        return -1;
    for (int64_t b = 0; b < q->in.rows; b++) {
        q->prefix_of_row[b] = b2py_prefix_of(self, PyTuple_GET_ITEM(q->prefixes, b), "prefixes");
        if (PyErr_Occurred())
            return -1;
    }
    q->in.prefixes = q->prefix_of_row;
    return 0;
}

/* 0; or -1 with a Python exception, or with `err` filled in. */
static int read_request(request *q, PyObject *self, b2py_call *call, b2_err *err)
{
    if (b2py_read_rows(&q->arrays, &q->in, self, &q->objects) < 0)
        return -1;
    PyArrayObject *timeline = q->arrays.decoder_ids ? q->arrays.decoder_ids : q->arrays.ids;
    if (read_vector(&q->rule_ids, q->rules, "rule_ids", NPY_INT32, PyArray_DIM(timeline, 0)) < 0 ||
        (q->key_array != Py_None && read_vector(&q->keys, q->key_array, "keys", NPY_UINT64, q->in.rows) < 0) ||
        read_prefixes(q, self, err) < 0 || b2py_parse_options(q->options, &q->opts, &q->storage, err) < 0 ||
        b2py_hooks_parse(&q->hooks, q->hook_dict, call, &q->opts) < 0)
        return -1;
    if (q->tap != Py_None && !PyCallable_Check(q->tap)) {
        PyErr_Format(PyExc_TypeError, "tap: expected a callable or None, found %s", Py_TYPE(q->tap)->tp_name);
        return -1;
    }
    return 0;
}

static int set_number(PyObject *dict, const char *key, int64_t value)
{
    PyObject *number = PyLong_FromLongLong(value);
    int status = number ? PyDict_SetItemString(dict, key, number) : -1;
    Py_XDECREF(number);
    return status;
}

int b2py_add_stats(PyObject *result, const b2_session_stats *stats)
{
    return set_number(result, "kv_bytes", stats->kv_bytes) < 0 ||
                   set_number(result, "step_allocations", stats->step_allocations) < 0 ||
                   set_number(result, "steps", stats->search.steps) < 0 ||
                   set_number(result, "items", stats->search.items) < 0 ||
                   set_number(result, "items_advanced", stats->search.items_advanced) < 0 ||
                   set_number(result, "rows_advanced", stats->search.rows_advanced) < 0
               ? -1
               : 0;
}

/* The kept prefixes as a list of objects, which take them over. */
static int add_kept(PyObject *result, PyObject *self, request *q)
{
    if (!q->kept)
        return 0;
    PyObject *list = PyList_New(kept_count(q));
    for (int64_t i = 0; list && i < kept_count(q); i++) {
        PyObject *prefix = new_prefix(self, q->kept[i]);
        q->kept[i] = NULL;
        if (!prefix)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, prefix);
    }
    int status = list ? PyDict_SetItemString(result, "prefixes", list) : -1;
    Py_XDECREF(list);
    return status;
}

static PyObject *run_generate(PyObject *self, const b2_blip2 *model, request *q, b2py_run *r)
{
    b2_session_request asked = {PyArray_DATA(q->rule_ids), q->keys ? PyArray_DATA(q->keys) : NULL,
                                q->keep ? &q->kept : NULL};
    watcher tap = {{watch_hidden, q->tap_weights ? watch_attention : NULL}, &r->call, q->tap};
    b2_generated out = {0};
    b2_session_stats stats = {0};
    if (b2py_run_begin(r, self, q->tap != Py_None ? &tap.tap : NULL) < 0)
        return NULL;
    int status = b2py_note_given(r, "image_features", q->arrays.features);
    if (status == 0)
        status = b2_session_generate(&r->ctx, model, &q->in, &asked, &q->opts, &out, &stats, &r->err);
    PyObject *result = b2py_run_end(r, self, status) == 0 ? b2py_generated_dict(&out) : NULL;
    b2_generated_release(&out);
    if (result && (b2py_add_stats(result, &stats) < 0 || add_kept(result, self, q) < 0))
        Py_CLEAR(result);
    return result;
}

PyObject *b2py_model_generate(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image_features", "ids",         "offsets",  "mask", "rule_ids", "options", "decoder_ids",
                            "decoder_offsets", "decoder_mask", "prefixes", "keys", "hooks",    "tap",     "tap_weights",
                            "keep", NULL};
    const b2_blip2 *model = b2py_language_model(self);
    request q = {.prefix_list = Py_None, .key_array = Py_None, .hook_dict = Py_None, .tap = Py_None};
    b2py_row_objects *o = &q.objects;
    if (!model || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO|OOOOOOOpp", names, &o->features, &o->ids, &o->offsets,
                                               &o->mask, &q.rules, &q.options, &o->decoder_ids, &o->decoder_offsets,
                                               &o->decoder_mask, &q.prefix_list, &q.key_array, &q.hook_dict, &q.tap,
                                               &q.tap_weights, &q.keep))
        return NULL;
    b2py_run r;
    b2_err err = {0};
    PyObject *result = NULL;
    if (read_request(&q, self, &r.call, &err) == 0)
        result = run_generate(self, model, &q, &r);
    else
        b2py_raise(b2py_state_of_type(Py_TYPE(self)), &err);
    request_release(&q);
    return result;
}
