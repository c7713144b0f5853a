/* What the files of the kernels on NumPy arrays share. */
#ifndef BLIP2C_PY_KERNELS_H
#define BLIP2C_PY_KERNELS_H

#include "python/py_array.h"
#include "python/py_common.h"

#include "core/tensor.h"

/* A packed weight or an array as *w; *owner keeps it alive, a new reference. A DeviceArray must lie at `place`. -1: the
 * exception is set. */
int b2py_weight_argument(b2_weight *w, PyObject **owner, PyObject *module, PyObject *object, const char *name,
                         b2py_place place);

int b2py_add_weight_kernels(PyObject *module); /* py_kernel_weights.c */

#endif
