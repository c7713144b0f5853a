#include "python/py_kernel_call.h"

#include "ops/weights.h"
#include "python/py_device.h"

b2_device *b2py_kernel_device(b2py_state *state, int index, b2_err *err)
{
    const b2_backend *backend = b2py_backend(state, err);
    if (!backend)
        return NULL;
    if (index >= B2PY_KERNEL_DEVICES) {
        b2_fail(err, B2_E_VALUE, "device: cuda:%d", index);
        return NULL;
    }
    if (!state->kernel_devices[index])
        state->kernel_devices[index] = backend->open(index, err);
    return state->kernel_devices[index];
}

int b2py_kernel_place(b2py_place *place, PyObject *module, const char *device)
{
    b2py_state *state = b2py_state_of_module(module);
    b2_err err = {0};
    int index;
    *place = (b2py_place){0};
    if (b2py_read_device(&index, device) < 0)
        return -1;
    if (index < 0)
        return 0;
    if (!(place->device = b2py_kernel_device(state, index, &err))) {
        b2py_raise(state, &err);
        return -1;
    }
    place->backend = state->backend;
    return 0;
}

static int begin_on_device(b2py_kernel_call *k, b2py_state *state, b2py_place place)
{
    b2_device *device = place.device;
    k->backend = place.backend;
    k->device = device;
    k->activations.memory = device->memory;
    k->ctx = (b2_ctx){.ops = device->ops, .pool = state->pool, .scratch = &k->scratch, .activations = &k->activations,
                      .memory = device->memory, .queue = k->backend->queue(device, &k->err)};
    return k->ctx.queue ? 0 : -1;
}

static void release(b2py_kernel_call *k)
{
    if (k->ctx.queue)
        k->backend->release(k->ctx.queue);
    for (int i = 0; i < k->count; i++)
        b2_memory_free(k->ctx.memory, k->moved[i].there);
    b2_arena_release(&k->scratch);
    b2_arena_release(&k->activations);
}

/* Tests: what scratch holds before must not matter. */
static int poison(b2_ctx *ctx, b2_err *err)
{
    memset(ctx->scratch->base, 0xff, ctx->scratch->size);
    return ctx->activations == ctx->scratch
               ? 0
               : b2_upload(ctx, ctx->activations->base, ctx->scratch->base, ctx->activations->size, err);
}

int b2py_kernel_begin(b2py_kernel_call *k, PyObject *module, b2py_place place, b2py_plan plan)
{
    b2py_state *state = b2py_state_of_module(module);
    int status = 0;
    *k = (b2py_kernel_call){0};
    if (place.device)
        status = begin_on_device(k, state, place);
    else
        k->ctx = (b2_ctx){.ops = state->ops, .pool = state->pool, .scratch = &k->scratch, .activations = &k->scratch};
    if (status == 0)
        status = b2_ctx_reserve(&k->ctx, b2_scratch_bytes(&k->ctx, plan.rows, plan.width, plan.keys, plan.head_dim), &k->err);
    if (status == 0 && getenv("BLIP2C_POISON"))
        status = poison(&k->ctx, &k->err);
    if (status < 0) {
        release(k);
        b2py_raise(state, &k->err);
        return -1;
    }
    k->ctx.cancel = b2py_call_begin(&k->call);
    return 0;
}

int b2py_kernel_end(b2py_kernel_call *k, PyObject *module, int status)
{
    if (k->err.code != B2_OK) /* of an argument that could not be moved */
        status = -1;
    for (int i = 0; i < k->count && status == 0; i++)
        if (k->moved[i].back)
            status = b2_download(&k->ctx, k->moved[i].back, k->moved[i].there, k->moved[i].bytes, &k->err);
    if (status == 0)
        status = b2_finish(&k->ctx, &k->err);
    release(k);
    b2py_call_end(&k->call);
    if (status < 0)
        b2py_raise(b2py_state_of_module(module), &k->err);
    return status;
}

/* ---- memory ---- */

static void *move(b2py_kernel_call *k, const void *data, void *back, size_t bytes)
{
    if (k->count == B2PY_MOVED_MOST) {
        b2_fail(&k->err, B2_E_INTERNAL, "kernels: more than %d arrays", B2PY_MOVED_MOST);
        return NULL;
    }
    void *there = b2_memory_alloc(k->ctx.memory, bytes, 1, "array", &k->err);
    if (!there)
        return NULL;
    k->moved[k->count++] = (struct b2py_moved){there, back, bytes};
    return b2_upload(&k->ctx, there, data, bytes, &k->err) < 0 ? NULL : there;
}

const void *b2py_to_device(b2py_kernel_call *k, const void *data, size_t bytes)
{
    return !data || b2_on_host(&k->ctx) ? data : move(k, data, NULL, bytes);
}

void *b2py_through_device(b2py_kernel_call *k, void *data, size_t bytes)
{
    return !data || b2_on_host(&k->ctx) ? data : move(k, data, data, bytes);
}

/* ---- arrays ---- */

b2_tensor b2py_view_of(PyArrayObject *array)
{
    int ndim = PyArray_NDIM(array);
    int64_t cols = ndim > 0 ? PyArray_DIM(array, ndim - 1) : 1, rows = 1;
    for (int i = 0; i + 1 < ndim; i++)
        rows *= PyArray_DIM(array, i);
    return b2_tensor_of(PyArray_DATA(array), rows, cols);
}

/* What lies on a device is used where it is. */
static const void *array_to_device(b2py_kernel_call *k, PyArrayObject *array)
{
    return b2py_is_on_device(array) ? PyArray_DATA(array)
                                    : b2py_to_device(k, PyArray_DATA(array), (size_t)PyArray_NBYTES(array));
}

b2_tensor b2py_input(b2py_kernel_call *k, PyArrayObject *array)
{
    b2_tensor t = b2py_view_of(array);
    t.data = (float *)array_to_device(k, array);
    return t;
}

b2_tensor b2py_output(b2py_kernel_call *k, PyArrayObject *array)
{
    b2_tensor t = b2py_view_of(array);
    if (!b2py_is_on_device(array))
        t.data = b2py_through_device(k, t.data, (size_t)PyArray_NBYTES(array));
    return t;
}

b2_weight b2py_vector(b2py_kernel_call *k, PyArrayObject *array)
{
    if (!array)
        return (b2_weight){0};
    int64_t n = PyArray_DIM(array, 0);
    return (b2_weight){.data = array_to_device(k, array), .n = n, .k = 1};
}

int b2py_matrix(b2_weight *there, b2py_kernel_call *k, const b2_weight *w)
{
    *there = *w;
    if (b2_on_host(&k->ctx) && w->memory)
        return b2_fail(&k->err, B2_E_VALUE, "weight: it lies on a device, and the product is asked of the processor");
    if (w->memory == k->ctx.memory)
        return 0;
    if (w->memory)
        return b2_fail(&k->err, B2_E_VALUE, "weight: it lies on another device");
    if (k->count == B2PY_MOVED_MOST)
        return b2_fail(&k->err, B2_E_INTERNAL, "kernels: more than %d arrays", B2PY_MOVED_MOST);
    if (b2_weight_stride(there, w, w->dtype, k->ctx.memory, k->ctx.pool, k->ctx.cancel, &k->err) < 0)
        return -1;
    k->moved[k->count++] = (struct b2py_moved){(void *)there->data, NULL, 0};
    /* Uploads are under way on a stream of their own; a queue begins when they are done. */
    k->backend->release(k->ctx.queue);
    k->ctx.queue = k->backend->queue(k->device, &k->err);
    return k->ctx.queue ? 0 : -1;
}
