#include "python/py_dtype.h"

#include <string.h>

#include "io/packed.h"

static int read_name(const b2py_state *state, PyObject *object, const char *what, b2_dtype_policy *policy)
{
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a name, found %s", what, Py_TYPE(object)->tp_name);
        return -1;
    }
    const char *name = PyUnicode_AsUTF8(object);
    if (!name)
        return -1;
    *policy = (b2_dtype_policy){.hold = B2_HOLD_STORED};
    if (strcmp(name, "auto") == 0)
        return 0;
    policy->hold = B2_HOLD_DTYPE;
    if (b2py_dtype_named(&policy->dtype, name) < 0) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected \"auto\", \"float32\", \"float16\", \"bfloat16\", \"int8\" or \"int4\", found %R", what,
                     object);
        return -1;
    }
    policy->pairs = policy->dtype == B2_BF16 && state->isa >= B2_ISA_AVX512_BF16;
    return 0;
}

static int part_named(PyObject *key)
{
    for (int i = 0; i < B2_PART_COUNT; i++)
        if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, b2_part_names[i]) == 0)
            return i;
    PyErr_Format(PyExc_ValueError, "dtype: expected the parts \"vision\", \"qformer\" and \"language\", found %R", key);
    return -1;
}

static int read_parts(const b2py_state *state, PyObject *dict, b2_dtype_policy policies[B2_PART_COUNT])
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict, &at, &key, &value)) {
        char what[32];
        int part = part_named(key);
        if (part < 0)
            return -1;
        snprintf(what, sizeof what, "dtype[\"%s\"]", b2_part_names[part]);
        if (read_name(state, value, what, &policies[part]) < 0)
            return -1;
    }
    return 0;
}

int b2py_read_policies(const b2py_state *state, PyObject *dtype, b2_dtype_policy policies[B2_PART_COUNT])
{
    memset(policies, 0, B2_PART_COUNT * sizeof *policies);
    if (PyDict_Check(dtype))
        return read_parts(state, dtype, policies);
    b2_dtype_policy whole;
    if (read_name(state, dtype, "dtype", &whole) < 0)
        return -1;
    for (int i = 0; i < B2_PART_COUNT; i++)
        policies[i] = whole;
    if (whole.hold != B2_HOLD_DTYPE)
        return 0;
    if (whole.dtype == B2_F16)
        policies[B2_PART_QFORMER].dtype = B2_F32;
    if (b2_dtype_is_quantised(whole.dtype)) {
        policies[B2_PART_VISION].dtype = B2_I8;
        policies[B2_PART_QFORMER] = (b2_dtype_policy){.hold = B2_HOLD_HALF};
    }
    return 0;
}

static PyObject *policies_of(PyObject *module, PyObject *dtype)
{
    b2_dtype_policy policies[B2_PART_COUNT];
    char text[B2_POLICIES_TEXT];
    if (b2py_read_policies(b2py_state_of_module(module), dtype, policies) < 0)
        return NULL;
    b2_policies_name(text, policies);
    return PyUnicode_FromString(text);
}

static PyMethodDef functions[] = {
    {"_policies", policies_of, METH_O,
     "_policies(dtype) -> str\n\nHow a dtype holds each part: \"vision=int8,qformer=half,language=int4\"."},
    {0},
};

int b2py_add_dtype(PyObject *module)
{
    if (PyModule_AddStringConstant(module, "PACKED_VERSION", B2_PACKED_VERSION) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
