#include "python/py_common.h"

int b2py_add_model(PyObject *module)
{
    (void)module;
    return 0;
}
