/* Finding and opening the CUDA library, and what it says of the devices that there are.
 *
 * It stands beside this module as _cuda.so; the environment variable BLIP2C_CUDA_LIBRARY names another one. It stays open as
 * long as the process lives: what CUDA has begun it does not like to be unloaded. */
#define _GNU_SOURCE /* dladdr */
#include "python/py_device.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_LENGTH = 4096 };

/* Beside the file that holds this function. */
static int installed_path(char path[PATH_LENGTH], b2_err *err)
{
    Dl_info self;
    const char *slash = NULL;
    if (dladdr((const void *)(uintptr_t)&b2py_backend, &self) != 0)
        slash = strrchr(self.dli_fname, '/');
    if (!slash || (size_t)(slash - self.dli_fname) + sizeof "/_cuda.so" > PATH_LENGTH)
        return b2_fail(err, B2_E_UNSUPPORTED, "cuda: the place of blip2c's own files is not known");
    PyOS_snprintf(path, PATH_LENGTH, "%.*s/_cuda.so", (int)(slash - self.dli_fname), self.dli_fname);
    return 0;
}

static const b2_backend *open_library(const char *path, b2_err *err)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const char *why = library ? NULL : dlerror();
    b2_backend_entry entry = NULL;
    if (!library) {
        b2_fail(err, B2_E_UNSUPPORTED, "cuda: this installation of blip2c cannot use it: %.400s", why ? why : path);
        return NULL;
    }
    *(void **)&entry = dlsym(library, B2_BACKEND_SYMBOL);
    const b2_backend *backend = entry ? entry() : NULL;
    if (backend && backend->version == B2_BACKEND_VERSION)
        return backend;
    b2_fail(err, B2_E_UNSUPPORTED, "cuda: %.300s %s", path,
            backend ? "was built for another version of blip2c" : "is no library of blip2c");
    dlclose(library);
    return NULL;
}

const b2_backend *b2py_backend(b2py_state *state, b2_err *err)
{
    char path[PATH_LENGTH];
    const char *named = getenv("BLIP2C_CUDA_LIBRARY");
    if (state->backend)
        return state->backend;
    if (named && strlen(named) >= PATH_LENGTH) {
        b2_fail(err, B2_E_UNSUPPORTED, "cuda: BLIP2C_CUDA_LIBRARY is too long");
        return NULL;
    }
    if (named && *named)
        strcpy(path, named);
    else if (installed_path(path, err) < 0)
        return NULL;
    return state->backend = open_library(path, err);
}

int b2py_read_device(int *index, const char *text)
{
    char *end;
    *index = -1;
    if (strcmp(text, "cpu") == 0)
        return 0;
    *index = 0;
    if (strcmp(text, "cuda") == 0)
        return 0;
    if (strncmp(text, "cuda:", 5) == 0 && text[5] >= '0' && text[5] <= '9') {
        long number = strtol(text + 5, &end, 10);
        *index = (int)number;
        if (*end == '\0' && number < 4096)
            return 0;
    }
    PyErr_Format(PyExc_ValueError, "device: expected cpu, cuda or cuda:0, cuda:1 ..., found %.100s", text);
    return -1;
}

/* ---- what there is ---- */

static PyObject *describe(const b2_backend *backend, int index, b2_err *err)
{
    b2_device_info info;
    char name[16], capability[24];
    if (backend->describe(&info, index, err) < 0)
        return NULL;
    PyOS_snprintf(name, sizeof name, "cuda:%d", index);
    PyOS_snprintf(capability, sizeof capability, "%d.%d", info.major, info.minor);
    return Py_BuildValue("{s:s,s:s,s:s,s:i,s:n,s:n,s:s}", "device", name, "name", info.name, "compute_capability", capability,
                         "multiprocessors", info.multiprocessors, "memory", (Py_ssize_t)info.memory, "free",
                         (Py_ssize_t)info.free, "products", info.products);
}

static PyObject *cuda_devices(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    b2py_state *state = b2py_state_of_module(module);
    b2_err err = {0};
    int count = 0;
    const b2_backend *backend = b2py_backend(state, &err);
    PyObject *list = backend && backend->count(&count, &err) == 0 ? PyList_New(0) : NULL;
    for (int i = 0; list && i < count; i++) {
        PyObject *device = describe(backend, i, &err);
        if (!device || PyList_Append(list, device) < 0)
            Py_CLEAR(list);
        Py_XDECREF(device);
    }
    return list || PyErr_Occurred() ? list : b2py_raise(state, &err);
}

static PyMethodDef methods[] = {
    {"cuda_devices", cuda_devices, METH_NOARGS,
     "cuda_devices() -> list of dicts: the CUDA devices. Raises UnsupportedError with the reason where there are none."},
    {0},
};

int b2py_add_devices(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
