/* What the files behind blip2c._core.Model share: py_model.c (life), py_weights.c, py_stages.c (its parts one by one: encode,
 * forward), py_retrieval.c (texts alone, similarity), py_generate.c and py_stream.c (generation). */
#ifndef B2_PY_MODEL_H
#define B2_PY_MODEL_H

#include "python/py_common.h"

#include "model/session.h"
#include "ops/backend.h"
#include "python/py_array.h"
#include "python/py_watch.h"

/* NULL with RuntimeError before __init__ has succeeded. */
const b2_blip2 *b2py_loaded_model(PyObject *self);
/* The same where there is a language model; else NULL with UnsupportedError. */
const b2_blip2 *b2py_language_model(PyObject *self);

/* Where the model is. */
b2py_place b2py_model_place(PyObject *self);

/* What a context stands on: scratch, and of a device its queue and scratch there. */
typedef struct b2py_lane {
    b2_arena arena, device_arena;
    const b2_backend *backend;
    void *queue;
} b2py_lane;

/* A context for one call on the model's device: its own scratch, the module's threads. begin releases the GIL, end takes it
 * back. */
typedef struct b2py_run {
    b2py_call call;
    b2py_lane lane;
    b2_ctx ctx;
    b2_err err;
} b2py_run;

/* 0; or -1 with the exception set and the GIL held: there is nothing to end then. */
int b2py_run_begin(b2py_run *run, PyObject *self, b2_tap *tap);
/* On the processor, whatever device the model is on: for what needs none of its weights. */
int b2py_run_begin_on_host(b2py_run *run, PyObject *self);
/* Between the two. An argument that lies on the device may hold NaN or Inf: then the call ends with a NumericError that names
 * it. One on the host was looked at before; NULL is nothing. */
int b2py_note_given(b2py_run *run, const char *name, PyArrayObject *array);
/* 0, or -1 with the exception set. */
int b2py_run_end(b2py_run *run, PyObject *self, int status);

/* The arrays behind a b2_rows_in. */
typedef struct b2py_rows {
    PyArrayObject *features, *ids, *offsets, *mask, *decoder_ids, *decoder_offsets, *decoder_mask;
} b2py_rows;

/* What a caller handed over for b2_rows_in: borrowed references, NULL or None where there is nothing. */
typedef struct b2py_row_objects {
    PyObject *features, *ids, *offsets, *mask, *decoder_ids, *decoder_offsets, *decoder_mask;
} b2py_row_objects;

int b2py_read_rows(b2py_rows *arrays, b2_rows_in *in, PyObject *model, const b2py_row_objects *objects);
void b2py_rows_release(b2py_rows *arrays);

/* Methods of Model in py_stages.c. on_device: results stay on the model's device (b2py_results_at). */
int b2py_results_at(b2py_place *place, PyObject *self, int on_device);
PyObject *b2py_model_encode(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_encode_stages(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_vision(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_read(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_forward(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_project(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_embed(PyObject *self, PyObject *args, PyObject *kwargs);

/* In py_retrieval.c. */
PyObject *b2py_model_read_texts(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_run_qformer(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_match(PyObject *self, PyObject *args);
PyObject *b2py_model_similarity(PyObject *self, PyObject *args);

/* In py_generate.c and py_stream.c. */
PyObject *b2py_model_generate(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_generate_stream(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_prefill(PyObject *self, PyObject *args, PyObject *kwargs);

/* A Prefix object's contents; NULL with TypeError naming `name` for anything else. None gives NULL without an exception. */
b2_prefix *b2py_prefix_of(PyObject *model, PyObject *object, const char *name);
/* Adds the counters of a search to a result. */
int b2py_add_stats(PyObject *result, const b2_session_stats *stats);

/* py_weights.c: the weights as arrays and as a packed file, and what they are held as. */
PyObject *b2py_model_weights(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *b2py_model_weight_names(PyObject *self, PyObject *ignored);
PyObject *b2py_model_save_packed(PyObject *self, PyObject *args);
PyObject *b2py_model_dtype(PyObject *self, void *closure);
PyObject *b2py_model_dtypes(PyObject *self, void *closure);
PyObject *b2py_model_policies(PyObject *self, void *closure);
PyObject *b2py_model_parameters(PyObject *self, void *closure);
PyObject *b2py_model_nbytes(PyObject *self, void *closure);

#endif
