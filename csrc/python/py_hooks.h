/* Python callables inside a search, and the rules of csrc/generate on arrays. Used by py_search.c and py_model.c. */
#ifndef B2_PY_HOOKS_H
#define B2_PY_HOOKS_H

#include "python/py_common.h"

#include "generate/generate.h"

/* The b2_hooks that take the GIL and call back. Start from {0}; holds references until b2py_hooks_release. */
typedef struct b2py_hooks {
    b2_hooks base;
    b2py_call *call;
    PyObject *process, *stop, *put, *logits, *scores;
} b2py_hooks;

/* `object`: None, or a dict of callables, each of which may be left out:
 *   process(ids int64 [n, t], scores float32 [n, V]) -> float32 [n, V], in place of all rules
 *   stop(ids int64 [n, t]) -> bool [n], put(tokens int64 [n]), logits(float32 [n, V]), scores(float32 [n, V])
 * ids are new tokens only; arrays are copies that the callable may keep. Sets opts->hooks, to NULL where there is none.
 * 0, or -1 with a Python exception. `call` is the frame that the search will run in. */
int b2py_hooks_parse(b2py_hooks *hooks, PyObject *object, b2py_call *call, b2_generate_opts *opts);
void b2py_hooks_release(b2py_hooks *hooks);

#endif
