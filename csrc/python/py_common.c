#include "python/py_common.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

b2py_state *b2py_state_of_module(PyObject *module)
{
    return PyModule_GetState(module);
}

b2py_state *b2py_state_of_type(PyTypeObject *type)
{
    return PyType_GetModuleState(type);
}

static PyObject *exception_for(b2py_state *state, b2_code code)
{
    switch (code) {
    case B2_E_VALUE: return PyExc_ValueError;
    case B2_E_TYPE: return PyExc_TypeError;
    case B2_E_INDEX: return PyExc_IndexError;
    case B2_E_MEMORY: return PyExc_MemoryError;
    case B2_E_OS: return PyExc_OSError;
    case B2_E_FORMAT: return state->checkpoint_error;
    case B2_E_NUMERIC: return state->numeric_error;
    case B2_E_UNSUPPORTED: return state->unsupported_error;
    case B2_E_CANCEL: return PyExc_KeyboardInterrupt;
    case B2_OK:
    case B2_E_CALLBACK:
    case B2_E_INTERNAL: break;
    }
    return PyExc_RuntimeError;
}

PyObject *b2py_raise(b2py_state *state, const b2_err *err)
{
    if (PyErr_Occurred())
        return NULL;
    /* A path inside the message need not be UTF-8. */
    PyObject *text = PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message), "replace");
    if (!text)
        return NULL;
    if (err->code == B2_E_OS && err->os_error != 0) {
        /* With an errno, OSError chooses its own subclass. */
        PyObject *arguments = Py_BuildValue("(iN)", err->os_error, text);
        if (arguments)
            PyErr_SetObject(PyExc_OSError, arguments);
        Py_XDECREF(arguments);
        return NULL;
    }
    PyErr_SetObject(exception_for(state, err->code), text);
    Py_DECREF(text);
    return NULL;
}

/* Runs on the thread that made the call, which gave up the GIL in b2py_call_begin. */
static int poll_signals(void *owner)
{
    b2py_call *call = owner;
    if (PyThread_get_thread_ident() != call->starter)
        return 0; /* a worker that runs nested work by itself has no thread state to restore */
    PyEval_RestoreThread(call->thread);
    int raised = PyErr_CheckSignals() < 0; /* does nothing outside the main thread */
    call->thread = PyEval_SaveThread();
    return raised;
}

/* Signals are answered on the process's first thread. Asked of the system, not of Python: running Python code here
 * would handle a waiting signal, and its exception would be lost. */
static int on_main_thread(void)
{
#if defined(__linux__)
    return (pid_t)syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
    return pthread_main_np();
#else
    return 1; /* polling elsewhere finds nothing, and costs little */
#endif
}

static void prepare(b2py_call *call)
{
    *call = (b2py_call){0};
    call->cancel.poll = on_main_thread() ? poll_signals : NULL;
    call->cancel.owner = call;
    call->starter = PyThread_get_thread_ident();
}

b2_cancel *b2py_call_begin(b2py_call *call)
{
    prepare(call);
    call->thread = PyEval_SaveThread();
    return &call->cancel;
}

b2_cancel *b2py_call_begin_listed(b2py_call *call, b2py_state *state)
{
    prepare(call);
    call->next = state->calls;
    state->calls = call;
    call->thread = PyEval_SaveThread();
    return &call->cancel;
}

void b2py_call_unlist(b2py_state *state, const b2py_call *call)
{
    b2py_call **link = &state->calls;
    while (*link != call)
        link = &(*link)->next;
    *link = call->next;
}

void b2py_cancel_calls(b2py_state *state, unsigned long starter)
{
    for (b2py_call *call = state->calls; call; call = call->next)
        if (call->starter == starter)
            atomic_store_explicit(&call->cancel.flag, 1, memory_order_relaxed);
}

void b2py_call_end(b2py_call *call)
{
    PyEval_RestoreThread(call->thread);
    call->thread = NULL;
}

void b2py_call_hold(b2py_call *call)
{
    PyEval_RestoreThread(call->thread);
}

void b2py_call_resume(b2py_call *call)
{
    call->thread = PyEval_SaveThread();
}

static int check_array(PyArrayObject *array, const char *name, int type, int ndim)
{
    if (PyArray_TYPE(array) != type) {
        PyArray_Descr *expected = PyArray_DescrFromType(type);
        PyErr_Format(PyExc_TypeError, "%s: expected an array of %S, found %S", name, (PyObject *)expected,
                     (PyObject *)PyArray_DESCR(array));
        Py_XDECREF(expected);
        return -1;
    }
    if (ndim >= 0 && PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d axes, found %d", name, ndim, PyArray_NDIM(array));
        return -1;
    }
    return 0;
}

PyArrayObject *b2py_array(PyObject *object, const char *name, int type, int ndim)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a numpy array, found %s", name, Py_TYPE(object)->tp_name);
        return NULL;
    }
    if (check_array((PyArrayObject *)object, name, type, ndim) < 0)
        return NULL;
    return (PyArrayObject *)PyArray_FROM_OF(object, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED);
}

int b2py_dtype_named(b2_dtype *dtype, const char *name)
{
    for (int i = 0; i < B2_DTYPE_COUNT; i++)
        if (strcmp(name, b2_dtype_word((b2_dtype)i)) == 0) {
            *dtype = (b2_dtype)i;
            return 0;
        }
    return -1;
}
