/* The kernels one by one on arrays: for tests and for people who want to see what they do. blip2c/kernels.py gives them
 * their public signatures. A result lies where the first array lies; on the host it starts as NaN, so that an element that
 * a kernel forgot shows. */
#include "python/py_kernels.h"
#include "python/py_kernel_call.h"

#include "model/t5.h"
#include "ops/cpu/common.h"
#include "train/cross_entropy.h"

/* ---- arguments ---- */

/* None becomes NULL without an error. */
static int optional_array(PyArrayObject **out, PyObject *object, const char *name, int type, int ndim)
{
    *out = NULL;
    if (object == Py_None)
        return 0;
    *out = b2py_array(object, name, type, ndim);
    return *out ? 0 : -1;
}

/* Floats on the host or at `place`. None becomes NULL without an error. */
static int optional_floats(PyArrayObject **out, PyObject *module, PyObject *object, const char *name, int ndim,
                           b2py_place place)
{
    *out = NULL;
    if (object == Py_None)
        return 0;
    *out = b2py_floats(b2py_state_of_module(module), object, name, ndim, place);
    return *out ? 0 : -1;
}

/* Of operations that take no scratch for the number of rows. */
static const b2py_plan one_row = {1, 1, 0, 1};

/* At least one axis, so that there is a last one. */
static PyArrayObject *rows_array(PyObject *module, PyObject *object, const char *name, b2py_place place)
{
    PyArrayObject *array = b2py_floats(b2py_state_of_module(module), object, name, -1, place);
    if (array && PyArray_NDIM(array) == 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected at least 1 axis, found 0", name);
        Py_CLEAR(array);
    }
    return array;
}

static PyArrayObject *poisoned(PyObject *module, b2py_place place, int ndim, const npy_intp *shape)
{
    b2py_state *state = b2py_state_of_module(module);
    b2_tensor view;
    PyArrayObject *out = (PyArrayObject *)(place.device ? b2py_new_floats(state, place, ndim, shape, &view)
                                                        : PyArray_SimpleNew(ndim, shape, NPY_FLOAT32));
    if (out && !place.device)
        memset(PyArray_DATA(out), 0xff, (size_t)PyArray_NBYTES(out));
    return out;
}

/* A copy in order, beside it. */
static PyArrayObject *copy_of(PyObject *module, PyArrayObject *array)
{
    return b2py_is_on_device(array) ? b2py_ordered(b2py_state_of_module(module), array)
                                    : (PyArrayObject *)PyArray_NewCopy(array, NPY_CORDER);
}

static PyObject *give(PyObject *module, PyArrayObject *out)
{
    return b2py_give(b2py_state_of_module(module), (PyObject *)out);
}

/* As `like` and beside it, with the last axis `cols` long. */
static PyArrayObject *poisoned_like(PyObject *module, PyArrayObject *like, int64_t cols)
{
    npy_intp shape[NPY_MAXDIMS];
    int ndim = PyArray_NDIM(like);
    memcpy(shape, PyArray_DIMS(like), (size_t)ndim * sizeof *shape);
    shape[ndim - 1] = (npy_intp)cols;
    return poisoned(module, b2py_place_of(like), ndim, shape);
}

static int check_length(PyArrayObject *array, const char *name, int64_t rows)
{
    if (!array || PyArray_DIM(array, 0) == rows)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %zd rows, found %zd", name, (Py_ssize_t)rows,
                 (Py_ssize_t)PyArray_DIM(array, 0));
    return -1;
}

/* ---- linear ---- */

typedef struct linear_arguments {
    PyArrayObject *x, *bias, *residual;
    int act;
    Py_ssize_t item_rows;
} linear_arguments;

static void drop_linear(linear_arguments *a)
{
    Py_CLEAR(a->x);
    Py_CLEAR(a->bias);
    Py_CLEAR(a->residual);
}

static int read_linear(linear_arguments *a, PyObject *module, b2py_place place, PyObject *x, PyObject *bias,
                       PyObject *residual)
{
    a->x = a->bias = a->residual = NULL;
    if (!(a->x = rows_array(module, x, "x", place)) || optional_floats(&a->bias, module, bias, "bias", 1, place) < 0 ||
        optional_floats(&a->residual, module, residual, "residual", -1, place) < 0) {
        drop_linear(a);
        return -1;
    }
    return 0;
}

static int run_linear(b2py_kernel_call *k, PyArrayObject *out, const linear_arguments *a, const b2_weight *w)
{
    b2_weight bias = b2py_vector(k, a->bias), there;
    b2_linear_opts opts = {.bias = a->bias ? &bias : NULL, .act = (b2_act)a->act, .item_rows = a->item_rows};
    if (a->residual)
        opts.residual = b2py_input(k, a->residual);
    if (b2py_matrix(&there, k, w) < 0)
        return -1;
    return b2_linear(&k->ctx, b2py_output(k, out), b2py_input(k, a->x), &there, &opts, &k->err);
}

static PyObject *linear(PyObject *module, PyObject *args)
{
    PyObject *x, *weight, *bias, *residual, *owner;
    linear_arguments a;
    b2_weight w;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOOOins", &x, &weight, &bias, &residual, &a.act, &a.item_rows, &device) ||
        b2py_kernel_place(&place, module, device) < 0 ||
        b2py_weight_argument(&w, &owner, module, weight, "weight", place) < 0)
        return NULL;
    if (read_linear(&a, module, place, x, bias, residual) < 0) {
        Py_DECREF(owner);
        return NULL;
    }
    PyArrayObject *out = poisoned_like(module, a.x, w.n);
    b2_tensor view = b2py_view_of(a.x);
    b2py_kernel_call k;
    if (out && b2py_kernel_begin(&k, module, place, (b2py_plan){view.rows, view.cols, 0, 1}) < 0)
        Py_CLEAR(out);
    else if (out && b2py_kernel_end(&k, module, run_linear(&k, out, &a, &w)) < 0)
        Py_CLEAR(out);
    drop_linear(&a);
    Py_DECREF(owner);
    return give(module, out);
}

static double seconds(void)
{
    return 1e-9 * (double)b2_now_ns();
}

/* Seconds per call of linear over each of `weights` in turn, with scratch reserved once, as a session runs it. */
static PyObject *time_linear(PyObject *module, PyObject *args)
{
    PyObject *x, *weights, *times = NULL;
    linear_arguments a = {0};
    if (!PyArg_ParseTuple(args, "OO!n", &x, &PyList_Type, &weights, &a.item_rows))
        return NULL;
    Py_ssize_t item_rows = a.item_rows, count = PyList_Size(weights);
    if (read_linear(&a, module, (b2py_place){0}, x, Py_None, Py_None) < 0)
        return NULL;
    a.item_rows = item_rows;
    b2_tensor view = b2py_view_of(a.x);
    b2py_kernel_call k;
    if (b2py_kernel_begin(&k, module, (b2py_place){0}, (b2py_plan){view.rows, view.cols, 0, 1}) < 0) {
        drop_linear(&a);
        return NULL;
    }
    b2py_call_hold(&k.call);
    times = PyList_New(0);
    int status = times ? 0 : -1;
    for (Py_ssize_t i = 0; i < count && status == 0; i++) {
        b2_weight w;
        PyObject *owner;
        if (b2py_weight_argument(&w, &owner, module, PyList_GetItem(weights, i), "weights", (b2py_place){0}) < 0)
            break;
        PyArrayObject *out = poisoned_like(module, a.x, w.n);
        b2py_call_resume(&k.call);
        double start = seconds();
        status = out ? run_linear(&k, out, &a, &w) : -1;
        double taken = seconds() - start;
        b2py_call_hold(&k.call);
        PyObject *time = PyFloat_FromDouble(taken);
        if (!time || PyList_Append(times, time) < 0)
            status = -1;
        Py_XDECREF(time);
        Py_XDECREF(out);
        Py_DECREF(owner);
    }
    b2py_call_resume(&k.call);
    b2py_kernel_end(&k, module, k.err.code != B2_OK ? -1 : 0);
    drop_linear(&a);
    if (PyErr_Occurred())
        Py_CLEAR(times);
    return times;
}

/* ---- rows ---- */

static PyObject *layer_norm(PyObject *module, PyObject *args)
{
    PyObject *x_object, *gamma_object, *beta_object;
    float eps;
    const char *device;
    b2py_place place;
    PyArrayObject *x = NULL, *gamma = NULL, *beta = NULL, *out = NULL;
    if (!PyArg_ParseTuple(args, "OOOfs", &x_object, &gamma_object, &beta_object, &eps, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    if (!(x = rows_array(module, x_object, "x", place)) || optional_floats(&gamma, module, gamma_object, "weight", 1, place) < 0 ||
        optional_floats(&beta, module, beta_object, "bias", 1, place) < 0)
        goto done;
    b2py_kernel_call k;
    if (!(out = poisoned_like(module, x, b2py_view_of(x).cols)))
        goto done;
    if (b2py_kernel_begin(&k, module, place, one_row) < 0) {
        Py_CLEAR(out);
        goto done;
    }
    b2_weight g = b2py_vector(&k, gamma), b = b2py_vector(&k, beta);
    if (b2py_kernel_end(&k, module, b2_layer_norm(&k.ctx, b2py_output(&k, out), b2py_input(&k, x), &g, &b, eps, &k.err)) < 0)
        Py_CLEAR(out);
done:
    Py_XDECREF(x);
    Py_XDECREF(gamma);
    Py_XDECREF(beta);
    return give(module, out);
}

static PyObject *rms_norm(PyObject *module, PyObject *args)
{
    PyObject *x_object, *gamma_object;
    float eps;
    const char *device;
    b2py_place place;
    PyArrayObject *x = NULL, *gamma = NULL, *out = NULL;
    if (!PyArg_ParseTuple(args, "OOfs", &x_object, &gamma_object, &eps, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    if ((x = rows_array(module, x_object, "x", place)) &&
        (gamma = b2py_floats(b2py_state_of_module(module), gamma_object, "weight", 1, place)) &&
        (out = poisoned_like(module, x, b2py_view_of(x).cols))) {
        b2py_kernel_call k;
        if (b2py_kernel_begin(&k, module, place, one_row) < 0) {
            Py_CLEAR(out);
        } else {
            b2_weight g = b2py_vector(&k, gamma);
            if (b2py_kernel_end(&k, module,
                                b2_rms_norm(&k.ctx, b2py_output(&k, out), b2py_input(&k, x), &g, eps, &k.err)) < 0)
                Py_CLEAR(out);
        }
    }
    Py_XDECREF(x);
    Py_XDECREF(gamma);
    return give(module, out);
}

static PyObject *gate(PyObject *module, PyObject *args)
{
    PyObject *gate_object, *up_object;
    int act;
    const char *device;
    b2py_place place;
    PyArrayObject *x = NULL, *up = NULL, *out = NULL;
    if (!PyArg_ParseTuple(args, "OOis", &gate_object, &up_object, &act, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    if ((x = rows_array(module, gate_object, "gate", place)) && (up = rows_array(module, up_object, "up", place)) &&
        (out = poisoned_like(module, x, b2py_view_of(x).cols))) {
        b2py_kernel_call k;
        if (b2py_kernel_begin(&k, module, place, one_row) < 0)
            Py_CLEAR(out);
        else if (b2py_kernel_end(&k, module, b2_gate(&k.ctx, b2py_output(&k, out), b2py_input(&k, x), b2py_input(&k, up),
                                                     (b2_act)act, &k.err)) < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(x);
    Py_XDECREF(up);
    return give(module, out);
}

/* Devices have activations in products and in gates: act(x) * 1. Takes over `x`. */
static PyObject *activation_as_gate(PyObject *module, PyArrayObject *x, int act, b2py_place place)
{
    PyArrayObject *ones = (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(x), PyArray_DIMS(x), NPY_FLOAT32);
    PyArrayObject *out = ones ? poisoned(module, b2py_place_of(x), PyArray_NDIM(x), PyArray_DIMS(x)) : NULL;
    b2py_kernel_call k;
    for (npy_intp i = 0; out && i < PyArray_SIZE(ones); i++)
        ((float *)PyArray_DATA(ones))[i] = 1.0f;
    if (out && b2py_kernel_begin(&k, module, place, one_row) < 0)
        Py_CLEAR(out);
    else if (out && b2py_kernel_end(&k, module, b2_gate(&k.ctx, b2py_output(&k, out), b2py_input(&k, x),
                                                        b2py_input(&k, ones), (b2_act)act, &k.err)) < 0)
        Py_CLEAR(out);
    Py_XDECREF(ones);
    Py_DECREF(x);
    return give(module, out);
}

static PyObject *activation(PyObject *module, PyObject *args)
{
    PyObject *object;
    int act;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "Ois", &object, &act, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *x = b2py_floats(b2py_state_of_module(module), object, "x", -1, place);
    if (x && place.device)
        return activation_as_gate(module, x, act, place);
    PyArrayObject *out = x ? poisoned(module, place, PyArray_NDIM(x), PyArray_DIMS(x)) : NULL;
    if (out) {
        int64_t count = PyArray_SIZE(x);
        const b2_epilogue epilogue = {.act = (b2_act)act};
        const b2_ctx ctx = {.ops = b2py_state_of_module(module)->ops};
        Py_BEGIN_ALLOW_THREADS
        b2_cpu_kernels_of(&ctx)->finish(PyArray_DATA(out), count, PyArray_DATA(x), count, 1, count, &epilogue);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(x);
    return give(module, out);
}

static PyObject *log_softmax(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "Os", &object, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *x = rows_array(module, object, "x", place);
    PyArrayObject *out = x ? copy_of(module, x) : NULL;
    Py_XDECREF(x);
    b2py_kernel_call k;
    if (!out)
        return NULL;
    if (b2py_kernel_begin(&k, module, place, one_row) < 0)
        Py_CLEAR(out);
    else if (b2py_kernel_end(&k, module, b2_log_softmax(&k.ctx, b2py_output(&k, out), &k.err)) < 0)
        Py_CLEAR(out);
    return give(module, out);
}

static PyObject *cross_entropy(PyObject *module, PyObject *args)
{
    PyObject *logits_object, *targets_object;
    long long ignore_index;
    if (!PyArg_ParseTuple(args, "OOL", &logits_object, &targets_object, &ignore_index))
        return NULL;
    PyArrayObject *logits = b2py_array(logits_object, "logits", NPY_FLOAT32, 2), *losses = NULL;
    PyArrayObject *targets = logits ? b2py_array(targets_object, "targets", NPY_INT64, 1) : NULL;
    npy_intp rows = logits ? PyArray_DIM(logits, 0) : 0;
    if (targets && PyArray_DIM(targets, 0) != rows)
        PyErr_Format(PyExc_ValueError, "targets: expected %zd, found %zd", rows, PyArray_DIM(targets, 0));
    else if (targets)
        losses = poisoned(module, (b2py_place){0}, 1, &rows);
    b2py_kernel_call k;
    if (losses && b2py_kernel_begin(&k, module, (b2py_place){0}, one_row) < 0)
        Py_CLEAR(losses);
    else if (losses && b2py_kernel_end(&k, module, b2_cross_entropy(&k.ctx, PyArray_DATA(losses), b2py_view_of(logits),
                                                               PyArray_DATA(targets), ignore_index, &k.err)) < 0)
        Py_CLEAR(losses);
    Py_XDECREF(logits);
    Py_XDECREF(targets);
    return (PyObject *)losses;
}

static PyObject *top_k(PyObject *module, PyObject *args)
{
    PyObject *object;
    int count;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "Ois", &object, &count, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *x = rows_array(module, object, "x", place), *values = NULL;
    PyObject *ids = NULL;
    /* A k that the operation refuses must not size anything before. */
    int fits = x && count > 0 && count <= b2py_view_of(x).cols;
    if (x && (values = poisoned_like(module, x, fits ? count : 0)))
        ids = PyArray_SimpleNew(PyArray_NDIM(values), PyArray_DIMS(values), NPY_INT32);
    int status = -1;
    b2py_kernel_call k;
    if (ids && b2py_kernel_begin(&k, module, place, one_row) == 0) {
        int32_t *to = b2py_through_device(&k, PyArray_DATA((PyArrayObject *)ids),
                                          (size_t)PyArray_NBYTES((PyArrayObject *)ids));
        status = b2py_kernel_end(&k, module,
                                 b2_top_k(&k.ctx, b2py_output(&k, values).data, to, b2py_input(&k, x), count, &k.err));
    }
    Py_XDECREF(x);
    if (status == 0)
        return Py_BuildValue("NN", give(module, values), ids);
    Py_XDECREF(values);
    Py_XDECREF(ids);
    return NULL;
}

static PyObject *first_bad_row(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "Os", &object, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *x = rows_array(module, object, "x", place);
    int64_t bad = -1;
    int status = -1;
    b2py_kernel_call k;
    if (x && b2py_kernel_begin(&k, module, place, one_row) == 0)
        status = b2py_kernel_end(&k, module, b2_check_finite(&k.ctx, &bad, b2py_input(&k, x), &k.err));
    Py_XDECREF(x);
    return status == 0 ? PyLong_FromLongLong(bad) : NULL;
}

static PyObject *rope(PyObject *module, PyObject *args)
{
    PyObject *x_object, *positions_object, *inv_freq_object;
    int head_dim;
    float scaling;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOOifs", &x_object, &positions_object, &inv_freq_object, &head_dim, &scaling, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *x = rows_array(module, x_object, "x", place), *out = NULL;
    PyArrayObject *positions = x ? b2py_array(positions_object, "positions", NPY_INT32, 1) : NULL;
    PyArrayObject *inv_freq = positions ? b2py_array(inv_freq_object, "inv_freq", NPY_FLOAT32, 1) : NULL;
    b2py_kernel_call k;
    if (inv_freq && check_length(positions, "positions", b2py_view_of(x).rows) == 0)
        out = copy_of(module, x);
    if (out && b2py_kernel_begin(&k, module, place, one_row) < 0)
        Py_CLEAR(out);
    else if (out && b2py_kernel_end(&k, module,
                               b2_rope(&k.ctx, b2py_output(&k, out), PyArray_DATA(positions), PyArray_DATA(inv_freq),
                                       2 * (int)PyArray_DIM(inv_freq, 0), head_dim, scaling, &k.err)) < 0)
        Py_CLEAR(out);
    Py_XDECREF(x);
    Py_XDECREF(positions);
    Py_XDECREF(inv_freq);
    return give(module, out);
}

static PyObject *embedding(PyObject *module, PyObject *args)
{
    PyObject *table_object, *ids_object, *added_object, *owner = NULL;
    PyArrayObject *ids = NULL, *added = NULL, *out = NULL;
    b2_weight table, there;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOOs", &table_object, &ids_object, &added_object, &device) ||
        b2py_kernel_place(&place, module, device) < 0 ||
        b2py_weight_argument(&table, &owner, module, table_object, "table", place) < 0)
        return NULL;
    if (!(ids = b2py_array(ids_object, "ids", NPY_INT32, 1)) ||
        optional_floats(&added, module, added_object, "added_to", 2, place) < 0)
        goto done;
    npy_intp shape[2] = {PyArray_DIM(ids, 0), (npy_intp)table.k};
    out = added ? copy_of(module, added) : poisoned(module, (b2py_place){0}, 2, shape);
    if (out && PyArray_DIM(out, 0) != shape[0]) {
        PyErr_Format(PyExc_ValueError, "added_to: expected %zd rows, found %zd", (Py_ssize_t)shape[0],
                     (Py_ssize_t)PyArray_DIM(out, 0));
        Py_CLEAR(out);
    }
    b2py_kernel_call k;
    if (!out)
        goto done;
    if (b2py_kernel_begin(&k, module, place, one_row) < 0) {
        Py_CLEAR(out);
        goto done;
    }
    int status = b2py_matrix(&there, &k, &table);
    if (status == 0)
        status = b2_embedding(&k.ctx, b2py_output(&k, out), &there, PyArray_DATA(ids), 0, added != NULL, &k.err);
    if (b2py_kernel_end(&k, module, status) < 0)
        Py_CLEAR(out);
done:
    Py_XDECREF(owner);
    Py_XDECREF(ids);
    Py_XDECREF(added);
    return give(module, out);
}

static PyObject *patches(PyObject *module, PyObject *args)
{
    PyObject *object;
    Py_ssize_t patch;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "Ons", &object, &patch, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *pixels = b2py_floats(b2py_state_of_module(module), object, "pixels", 4, place), *out = NULL;
    if (!pixels)
        return NULL;
    npy_intp *shape = PyArray_DIMS(pixels);
    npy_intp cells = patch > 0 ? shape[2] / patch * (shape[3] / patch) : 0;
    npy_intp out_shape[3] = {shape[0], cells, patch > 0 ? shape[1] * patch * patch : 0};
    b2_pictures view = {PyArray_DATA(pixels), shape[0], shape[1], shape[2], shape[3]};
    b2py_kernel_call k;
    out = poisoned(module, b2py_place_of(pixels), 3, out_shape);
    if (out && b2py_kernel_begin(&k, module, place, one_row) < 0) {
        Py_CLEAR(out);
    } else if (out) {
        view.data = b2py_input(&k, pixels).data;
        if (b2py_kernel_end(&k, module, b2_patches(&k.ctx, b2py_output(&k, out), view, patch, &k.err)) < 0)
            Py_CLEAR(out);
    }
    Py_DECREF(pixels);
    return give(module, out);
}

static PyObject *copy_rows(PyObject *module, PyObject *args)
{
    PyObject *out_object, *out_rows_object, *x_object, *x_rows_object;
    PyArrayObject *base = NULL, *out_rows = NULL, *x = NULL, *x_rows = NULL, *out = NULL;
    Py_ssize_t n;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOOOns", &out_object, &out_rows_object, &x_object, &x_rows_object, &n, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    if ((base = b2py_floats(b2py_state_of_module(module), out_object, "out", 2, place)) &&
        (x = b2py_floats(b2py_state_of_module(module), x_object, "x", 2, place)) &&
        optional_array(&out_rows, out_rows_object, "out_rows", NPY_INT32, 1) == 0 &&
        optional_array(&x_rows, x_rows_object, "x_rows", NPY_INT32, 1) == 0)
        out = copy_of(module, base);
    if (out && ((out_rows && PyArray_DIM(out_rows, 0) < n) || (x_rows && PyArray_DIM(x_rows, 0) < n))) {
        PyErr_Format(PyExc_ValueError, "n: %zd rows, more than a list of rows holds", n);
        Py_CLEAR(out);
    }
    b2py_kernel_call k;
    if (out && b2py_kernel_begin(&k, module, place, one_row) < 0)
        Py_CLEAR(out);
    else if (out && b2py_kernel_end(&k, module,
                               b2_copy_rows(&k.ctx, b2py_output(&k, out), out_rows ? PyArray_DATA(out_rows) : NULL,
                                            b2py_input(&k, x), x_rows ? PyArray_DATA(x_rows) : NULL, n, &k.err)) < 0)
        Py_CLEAR(out);
    Py_XDECREF(base);
    Py_XDECREF(out_rows);
    Py_XDECREF(x);
    Py_XDECREF(x_rows);
    return give(module, out);
}

static PyObject *add_rows(PyObject *module, PyObject *args)
{
    PyObject *a_object, *b_object;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOs", &a_object, &b_object, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    PyArrayObject *a = rows_array(module, a_object, "x", place);
    PyArrayObject *b = a ? rows_array(module, b_object, "rows", place) : NULL;
    PyArrayObject *out = b ? copy_of(module, a) : NULL;
    b2py_kernel_call k;
    if (out && b2py_kernel_begin(&k, module, place, one_row) < 0)
        Py_CLEAR(out);
    else if (out && b2py_kernel_end(&k, module, b2_add_rows(&k.ctx, b2py_output(&k, out), b2py_input(&k, b), &k.err)) < 0)
        Py_CLEAR(out);
    Py_XDECREF(a);
    Py_XDECREF(b);
    return give(module, out);
}

/* ---- attention ---- */

static PyObject *distance_bias(PyObject *module, PyObject *args)
{
    PyObject *object;
    Py_ssize_t max_distance;
    int bidirectional;
    if (!PyArg_ParseTuple(args, "Onp", &object, &max_distance, &bidirectional))
        return NULL;
    PyArrayObject *table = b2py_array(object, "table", NPY_FLOAT32, 2), *out = NULL;
    if (!table)
        return NULL;
    npy_intp buckets = PyArray_DIM(table, 0), heads = PyArray_DIM(table, 1);
    if (buckets < 4 || buckets > 1 << 20 || max_distance <= buckets / 2 || max_distance > 1 << 20) {
        PyErr_Format(PyExc_ValueError, "table: %zd buckets for distances up to %zd; expected at least 4 buckets, and "
                     "distances beyond half of them", (Py_ssize_t)buckets, max_distance);
    } else {
        npy_intp shape[2] = {heads, 2 * max_distance + 1};
        if ((out = poisoned(module, (b2py_place){0}, 2, shape)))
            b2_t5_distance_bias(PyArray_DATA(out), PyArray_DATA(table), (int)buckets, (int)heads, max_distance,
                                bidirectional);
    }
    Py_DECREF(table);
    return give(module, out);
}

enum { A_Q, A_OFFSETS, A_K, A_V, A_STARTS, A_LENS, A_KS, A_VS, A_SLOTS, A_SLENS, A_MASK, A_BIAS, A_COUNT };

static const struct {
    const char *name;
    int type, ndim, optional;
} attention_inputs[A_COUNT] = {
    {"q", NPY_FLOAT32, 2, 0},          {"q_offsets", NPY_INT32, 1, 0},    {"k", NPY_FLOAT32, 2, 0},
    {"v", NPY_FLOAT32, 2, 0},          {"prefix_starts", NPY_INT32, 1, 0}, {"prefix_lens", NPY_INT32, 1, 0},
    {"k_suffix", NPY_FLOAT32, 2, 1},   {"v_suffix", NPY_FLOAT32, 2, 1},   {"suffix_slots", NPY_INT32, 2, 1},
    {"suffix_lens", NPY_INT32, 1, 1},  {"key_mask", NPY_UINT8, 2, 1},     {"distance_bias", NPY_FLOAT32, 2, 1},
};

static int fill_distance_bias(b2_attention_args *a, PyArrayObject *bias)
{
    npy_intp rows = PyArray_DIM(bias, 0), distances = PyArray_DIM(bias, 1);
    a->distance_bias = PyArray_DATA(bias);
    a->distance_limit = (distances + 1) / 2;
    if (rows == a->heads && distances % 2 == 1)
        return 0;
    PyErr_Format(PyExc_ValueError, "distance_bias: expected shape [%d, an odd number], found [%zd, %zd]", a->heads, rows,
                 distances);
    return -1;
}

static int fill_attention(b2_attention_args *a, PyArrayObject **in)
{
    a->rows = PyArray_DIM(in[A_OFFSETS], 0) - 1;
    if (a->rows < 0) {
        PyErr_SetString(PyExc_ValueError, "q_offsets: expected at least 1 element, found 0");
        return -1;
    }
    for (int i = A_STARTS; i <= A_MASK; i++)
        if (i != A_KS && i != A_VS && check_length(in[i], attention_inputs[i].name, a->rows) < 0)
            return -1;
    if (!in[A_KS] != !in[A_VS] || !in[A_KS] != !in[A_SLOTS] || !in[A_KS] != !in[A_SLENS]) {
        PyErr_SetString(PyExc_ValueError, "k_suffix, v_suffix, suffix_slots and suffix_lens: give all or none");
        return -1;
    }
    a->q = b2py_view_of(in[A_Q]);
    a->q_offsets = PyArray_DATA(in[A_OFFSETS]);
    a->k = b2py_view_of(in[A_K]);
    a->v = b2py_view_of(in[A_V]);
    a->prefix_starts = PyArray_DATA(in[A_STARTS]);
    a->prefix_lens = PyArray_DATA(in[A_LENS]);
    if (in[A_KS]) {
        a->k_suffix = b2py_view_of(in[A_KS]);
        a->v_suffix = b2py_view_of(in[A_VS]);
        a->suffix_slots = PyArray_DATA(in[A_SLOTS]);
        a->suffix_ld = PyArray_DIM(in[A_SLOTS], 1);
        a->suffix_lens = PyArray_DATA(in[A_SLENS]);
    }
    if (in[A_MASK]) {
        a->key_mask = PyArray_DATA(in[A_MASK]);
        a->key_mask_ld = PyArray_DIM(in[A_MASK], 1);
    }
    return in[A_BIAS] ? fill_distance_bias(a, in[A_BIAS]) : 0;
}

static b2py_plan attention_plan(const b2_attention_args *a)
{
    int64_t keys = 0;
    for (int64_t b = 0; b < a->rows; b++) {
        int64_t n = (int64_t)a->prefix_lens[b] + (a->suffix_lens ? a->suffix_lens[b] : 0);
        keys = n > keys ? n : keys;
    }
    /* Lengths beyond what there is are refused by the operation; they must not size anything before. */
    int64_t most = a->k.rows + a->suffix_ld;
    return (b2py_plan){a->q.rows, a->q.cols, keys < most ? keys : most, a->head_dim > 0 ? a->head_dim : 1};
}

/* Floats of all rows' weights, [H, T_b, keys_b] each; 0 where there are more of something than there is, which the operation
 * refuses. */
static npy_intp weights_size(const b2_attention_args *a)
{
    npy_intp size = 0;
    int64_t most = a->k.rows + a->suffix_ld;
    for (int64_t b = 0; b < a->rows; b++) {
        int64_t queries = (int64_t)a->q_offsets[b + 1] - a->q_offsets[b];
        int64_t keys = (int64_t)a->prefix_lens[b] + (a->suffix_lens ? a->suffix_lens[b] : 0);
        if (queries < 0 || queries > a->q.rows || keys < 0 || keys > most || a->heads < 1 || a->heads > a->q.cols)
            return 0;
        size += (npy_intp)(a->heads * queries * keys);
    }
    return size;
}

static PyObject *attention(PyObject *module, PyObject *args)
{
    PyObject *objects[A_COUNT];
    PyArrayObject *in[A_COUNT] = {0}, *out = NULL;
    b2_attention_args a = {0};
    long long window;
    int weights;
    const char *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOOOpiiifLps", &objects[A_Q], &objects[A_OFFSETS], &objects[A_K],
                          &objects[A_V], &objects[A_STARTS], &objects[A_LENS], &objects[A_KS], &objects[A_VS],
                          &objects[A_SLOTS], &objects[A_SLENS], &objects[A_MASK], &objects[A_BIAS], &a.causal,
                          &a.heads, &a.kv_heads, &a.head_dim, &a.scale, &window, &weights, &device) ||
        b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    a.window = window;
    for (int i = 0; i < A_COUNT; i++) {
        if (attention_inputs[i].optional && objects[i] == Py_None)
            continue;
        int ndim = attention_inputs[i].ndim, moves = i == A_Q || i == A_K || i == A_V || i == A_KS || i == A_VS;
        in[i] = moves ? b2py_floats(b2py_state_of_module(module), objects[i], attention_inputs[i].name, ndim, place)
                      : b2py_array(objects[i], attention_inputs[i].name, attention_inputs[i].type, ndim);
        if (!in[i])
            goto done;
    }
    if (fill_attention(&a, in) < 0)
        goto done;
    npy_intp size = weights ? weights_size(&a) : 0;
    b2py_place at = b2py_place_of(in[A_Q]);
    if (!(out = weights ? poisoned(module, at, 1, &size) : poisoned(module, at, 2, PyArray_DIMS(in[A_Q]))))
        goto done;
    b2py_kernel_call k;
    if (b2py_kernel_begin(&k, module, place, attention_plan(&a)) < 0) {
        Py_CLEAR(out);
        goto done;
    }
    a.q = b2py_input(&k, in[A_Q]);
    a.k = b2py_input(&k, in[A_K]);
    a.v = b2py_input(&k, in[A_V]);
    if (in[A_KS]) {
        a.k_suffix = b2py_input(&k, in[A_KS]);
        a.v_suffix = b2py_input(&k, in[A_VS]);
    }
    b2_tensor there = b2py_output(&k, out);
    a.out = weights ? (b2_tensor){0} : there;
    int status = weights ? b2_attention_weights(&k.ctx, there.data, &a, &k.err) : b2_attention(&k.ctx, &a, &k.err);
    if (b2py_kernel_end(&k, module, status) < 0)
        Py_CLEAR(out);
done:
    for (int i = 0; i < A_COUNT; i++)
        Py_XDECREF(in[i]);
    return give(module, out);
}

/* ---- arrays ---- */

static PyObject *take(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *name, *device;
    b2py_place place;
    if (!PyArg_ParseTuple(args, "Oss", &object, &name, &device) || b2py_kernel_place(&place, module, device) < 0)
        return NULL;
    if (place.device)
        return b2py_take(b2py_state_of_module(module), object, name, place);
    PyErr_Format(PyExc_ValueError, "%s: lies on a device, expected the host or another device=", name);
    return NULL;
}

/* ---- the machine's ceiling ---- */

typedef struct peak_job {
    double (*peak)(int64_t rounds, float *sink);
    double flops;
    float sinks[B2_MAX_THREADS];
} peak_job;

static void peak_tile(void *argument, int64_t index, int worker)
{
    peak_job *job = argument;
    double flops = job->peak(2 * 1000 * 1000, &job->sinks[worker]);
    if (index == 0)
        job->flops = flops;
}

static PyObject *run_peak(b2py_state *state, double (*peak)(int64_t, float *))
{
    peak_job job = {.peak = peak};
    b2_err err = {0};
    int64_t tiles = 8 * b2_pool_threads(state->pool);
    double start;
    int status;
    Py_BEGIN_ALLOW_THREADS
    start = seconds();
    status = b2_pool_run(state->pool, tiles, peak_tile, &job, NULL, &err);
    start = seconds() - start;
    Py_END_ALLOW_THREADS
    return status < 0 ? b2py_raise(state, &err) : PyFloat_FromDouble(job.flops * (double)tiles / start);
}

static PyObject *fma_peak(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    b2py_state *state = b2py_state_of_module(module);
    const b2_ctx ctx = {.ops = state->ops};
    return run_peak(state, b2_cpu_kernels_of(&ctx)->fma_peak);
}

/* Where the processor has no products of bfloat16, they are computed in fp32. */
static PyObject *bf16_peak(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    b2py_state *state = b2py_state_of_module(module);
    const b2_ctx ctx = {.ops = state->ops};
    const b2_pair_kernels *pairs = b2_cpu_pairs_of(&ctx);
    return run_peak(state, pairs ? pairs->peak : b2_cpu_kernels_of(&ctx)->fma_peak);
}

static PyObject *int8_peak(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    b2py_state *state = b2py_state_of_module(module);
    const b2_ctx ctx = {.ops = state->ops};
    return run_peak(state, b2_cpu_quad_tiles_of(&ctx)->peak);
}

static PyMethodDef kernel_methods[] = {
    {"_linear", linear, METH_VARARGS, "_linear(x, weight, bias, residual, activation, item_rows, device) -> array"},
    {"_time_linear", time_linear, METH_VARARGS, "_time_linear(x, weights, item_rows) -> seconds of each call"},
    {"_layer_norm", layer_norm, METH_VARARGS, "_layer_norm(x, weight, bias, eps, device) -> array"},
    {"_rms_norm", rms_norm, METH_VARARGS, "_rms_norm(x, weight, eps, device) -> array"},
    {"_gate", gate, METH_VARARGS, "_gate(gate, up, activation, device) -> array"},
    {"_rope", rope, METH_VARARGS, "_rope(x, positions, inv_freq, head_dim, scaling, device) -> array"},
    {"_activation", activation, METH_VARARGS, "_activation(x, activation, device) -> array"},
    {"_log_softmax", log_softmax, METH_VARARGS, "_log_softmax(x, device) -> array"},
    {"_cross_entropy", cross_entropy, METH_VARARGS, "_cross_entropy(logits, targets, ignore_index) -> losses"},
    {"_top_k", top_k, METH_VARARGS, "_top_k(x, k, device) -> (values, ids)"},
    {"_first_bad_row", first_bad_row, METH_VARARGS, "_first_bad_row(x, device) -> int"},
    {"_embedding", embedding, METH_VARARGS, "_embedding(table, ids, added_to, device) -> array"},
    {"_patches", patches, METH_VARARGS, "_patches(pixels, patch, device) -> array"},
    {"_copy_rows", copy_rows, METH_VARARGS, "_copy_rows(out, out_rows, x, x_rows, n, device) -> array"},
    {"_add_rows", add_rows, METH_VARARGS, "_add_rows(x, rows, device) -> array"},
    {"_distance_bias", distance_bias, METH_VARARGS, "_distance_bias(table, max_distance, bidirectional) -> array"},
    {"_attention", attention, METH_VARARGS, "_attention(...) -> array; see blip2c.kernels.packed_attention"},
    {"_take", take, METH_VARARGS, "_take(array, name, device) -> DeviceArray: as Model.take"},
    {"_fma_peak", fma_peak, METH_NOARGS, "_fma_peak() -> flops per second of multiply-adds in registers"},
    {"_bf16_peak", bf16_peak, METH_NOARGS, "_bf16_peak() -> operations per second of bfloat16 products in registers"},
    {"_int8_peak", int8_peak, METH_NOARGS, "_int8_peak() -> operations per second of int8 products in registers"},
    {0},
};

int b2py_add_kernels(PyObject *module)
{
    return PyModule_AddFunctions(module, kernel_methods) < 0 ? -1 : b2py_add_weight_kernels(module);
}
