/* The configuration of a model, from the mapping that blip2c.config.core_config() makes. */
#ifndef B2_PY_CONFIG_H
#define B2_PY_CONFIG_H

#include "python/py_common.h"

#include "model/blip2.h"

/* 0, or -1 with an exception that names the section and the key. A part whose section (vision, text, heads) is missing
 * is not in the model. */
int b2py_read_config(b2py_state *state, PyObject *config, b2_blip2_config *out);

#endif
