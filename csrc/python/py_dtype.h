/* The dtypes that a caller asks for, by part of the model. */
#ifndef B2_PY_DTYPE_H
#define B2_PY_DTYPE_H

#include "python/py_common.h"

#include "model/blip2.h"

/* `dtype` is a name for the whole model or a mapping from "vision", "qformer", "language" to names (a part that is not
 * there: "auto"). What a name for the whole model means, part by part:
 *     auto, float32, bfloat16   every part so
 *     float16                   the Q-Former as float32: transformers keeps it so (_keep_in_fp32_modules)
 *     int8                      the Q-Former in 16 bits: it is 3 % of the weights, and all that the language model sees
 *     int4                      the language model; vision int8, the Q-Former in 16 bits
 * bfloat16 means bfloat16 arithmetic where the processor has it. 0, or -1 with an exception. */
int b2py_read_policies(const b2py_state *state, PyObject *dtype, b2_dtype_policy policies[B2_PART_COUNT]);

/* _policies(dtype) -> the text of b2_policies_name, and the constant PACKED_VERSION. */
int b2py_add_dtype(PyObject *module);

#endif
