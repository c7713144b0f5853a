/* blip2c._core: the module object, its state and what it says of the machine. */
#define B2_PY_MODULE_FILE
#include "python/py_array.h"
#include "python/py_common.h"
#include "python/py_device.h"
#include "python/py_dtype.h"

#include "core/memory.h"
#include "ops/cpu/cpu_ops.h"
#include "ops/cpu/blas.h"

static PyObject *new_exception(PyObject *module, const char *name, const char *doc, PyObject *base)
{
    PyObject *type = PyErr_NewExceptionWithDoc(name, doc, base, NULL);
    if (type && PyModule_AddObjectRef(module, strrchr(name, '.') + 1, type) < 0)
        Py_CLEAR(type);
    return type;
}

static int add_exceptions(PyObject *module, b2py_state *state)
{
    state->checkpoint_error =
        new_exception(module, "blip2c.CheckpointError",
                      "A checkpoint file is damaged, or disagrees with its configuration.", PyExc_ValueError);
    state->numeric_error = new_exception(module, "blip2c.NumericError",
                                         "A NaN or Inf where a number must be: in weights, pictures or logits.",
                                         PyExc_ArithmeticError);
    state->unsupported_error = new_exception(module, "blip2c.UnsupportedError",
                                             "A known option, model or instruction set that blip2c does not do.",
                                             PyExc_NotImplementedError);
    return state->checkpoint_error && state->numeric_error && state->unsupported_error ? 0 : -1;
}

static int choose_machine(b2py_state *state)
{
    b2_err err = {0};
    b2_cpu_detect(&state->cpu);
    if (b2_isa_choose(&state->isa, &state->cpu, getenv("BLIP2C_ISA"), &err) < 0) {
        b2py_raise(state, &err);
        return -1;
    }
    state->ops = b2_cpu_ops(state->isa);
    b2_blas_use_one_thread();
    state->pool = b2_pool_create(b2_available_processors(), &err);
    if (!state->pool) {
        b2py_raise(state, &err);
        return -1;
    }
    return 0;
}

static int module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    b2py_state *state = b2py_state_of_module(module);
    if (add_exceptions(module, state) < 0 || choose_machine(state) < 0)
        return -1;
    if (b2py_add_kernels(module) < 0 || b2py_add_search(module) < 0 || b2py_add_rules(module) < 0 ||
        b2py_add_safetensors(module) < 0 || b2py_add_model(module) < 0 || b2py_add_dtype(module) < 0 ||
        b2py_add_prefix(module) < 0 || b2py_add_devices(module) < 0 || b2py_add_index(module) < 0 ||
        b2py_add_arrays(module) < 0)
        return -1;
    return 0;
}

static PyObject *cpu_info(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    b2py_state *state = b2py_state_of_module(module);
    const b2_cpu *cpu = &state->cpu;
    return Py_BuildValue("{s:s,s:s,s:N,s:N,s:N,s:N,s:i}", "brand", cpu->brand, "isa", b2_isa_name(state->isa), "avx2",
                         PyBool_FromLong(cpu->avx2), "avx512", PyBool_FromLong(cpu->avx512), "avx512_vnni",
                         PyBool_FromLong(cpu->avx512_vnni), "avx512_bf16", PyBool_FromLong(cpu->avx512_bf16),
                         "processors", b2_available_processors());
}

static PyObject *get_num_threads(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(b2_pool_threads(b2py_state_of_module(module)->pool));
}

static PyObject *set_num_threads(PyObject *module, PyObject *argument)
{
    b2py_state *state = b2py_state_of_module(module);
    b2_err err = {0};
    long threads = PyLong_AsLong(argument);
    if (threads == -1 && PyErr_Occurred())
        return NULL;
    if (threads < 1 || threads > B2_MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "threads: expected 1 to %d, found %ld", B2_MAX_THREADS, threads);
        return NULL;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = b2_pool_resize(state->pool, (int)threads, &err);
    Py_END_ALLOW_THREADS
    if (status < 0)
        return b2py_raise(state, &err);
    Py_RETURN_NONE;
}

static PyObject *allocation_count(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(b2_alloc_count());
}

static PyObject *fail_allocation_after(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long long countdown = PyLong_AsLongLong(argument);
    if (countdown == -1 && PyErr_Occurred())
        return NULL;
    b2_alloc_fail_after(countdown);
    Py_RETURN_NONE;
}

static PyObject *cancel_calls(PyObject *module, PyObject *argument)
{
    unsigned long starter = PyLong_AsUnsignedLong(argument);
    if (starter == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    b2py_cancel_calls(b2py_state_of_module(module), starter);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"cpu_info", cpu_info, METH_NOARGS, "cpu_info() -> dict\n\nThe processor and the instruction set in use."},
    {"get_num_threads", get_num_threads, METH_NOARGS, "get_num_threads() -> int\n\nThreads per computation."},
    {"set_num_threads", set_num_threads, METH_O,
     "set_num_threads(n)\n\nThreads per computation, the calling one included. Results do not depend on it."},
    {"cancel_calls", cancel_calls, METH_O,
     "cancel_calls(thread_ident)\n\nThe model's calls that a thread is in now end soon, with KeyboardInterrupt."},
    {"_allocation_count", allocation_count, METH_NOARGS, "Blocks allocated by the C code so far (for tests)."},
    {"_fail_allocation_after", fail_allocation_after, METH_O, "The n-th allocation from now fails, once (for tests)."},
    {0},
};

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    b2py_state *state = b2py_state_of_module(module);
    Py_VISIT(state->checkpoint_error);
    Py_VISIT(state->numeric_error);
    Py_VISIT(state->unsupported_error);
    Py_VISIT(state->safetensors_type);
    Py_VISIT(state->model_type);
    Py_VISIT(state->prefix_type);
    Py_VISIT(state->array_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    b2py_state *state = b2py_state_of_module(module);
    Py_CLEAR(state->checkpoint_error);
    Py_CLEAR(state->numeric_error);
    Py_CLEAR(state->unsupported_error);
    Py_CLEAR(state->safetensors_type);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->prefix_type);
    Py_CLEAR(state->array_type);
    return 0;
}

static void module_free(void *module)
{
    b2py_state *state = b2py_state_of_module(module);
    module_clear(module);
    b2_pool_destroy(state->pool);
    state->pool = NULL;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters /* NumPy does not support subinterpreters, nor do we */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_doc = "The C part of blip2c.",
    .m_size = sizeof(b2py_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
