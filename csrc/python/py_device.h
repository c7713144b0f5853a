/* Devices besides the processor, through the library that computes on them (ops/backend.h). */
#ifndef B2_PY_DEVICE_H
#define B2_PY_DEVICE_H

#include "python/py_common.h"

#include "ops/backend.h"

/* The library, opened the first time; NULL with B2_E_UNSUPPORTED and the reason where there is none. The GIL is held. */
const b2_backend *b2py_backend(b2py_state *state, b2_err *err);

/* *index of "cuda" or "cuda:3", -1 of "cpu". 0, or -1 with ValueError naming what was found. */
int b2py_read_device(int *index, const char *text);

int b2py_add_devices(PyObject *module); /* cuda_devices() */

#endif
