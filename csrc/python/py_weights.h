/* A model's weights for Python: as arrays, as a packed file, and what they are held as. Used by py_model.c. */
#ifndef B2_PY_WEIGHTS_H
#define B2_PY_WEIGHTS_H

#include "python/py_common.h"

#include "model/blip2.h"

/* {name: array of the checkpoint's shape}: float32 (also of quantised weights), float16, or uint16 with bfloat16 bits. The
 * GIL is released while they are unpacked, by all threads. */
PyObject *b2py_weights_dict(b2py_state *state, const b2_blip2 *model);

/* save_packed(path, metadata): `metadata` a dict of str. None, or NULL with an exception. */
PyObject *b2py_save_packed(b2py_state *state, const b2_blip2 *model, PyObject *args);

/* {"vision": "int8", "qformer": "float16", "language": "int4"} */
PyObject *b2py_part_dtypes(const b2_blip2 *model);

#endif
