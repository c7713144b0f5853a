/* What a caller of _core.Model wants to see of a pass: hidden states and attention weights, filled into NumPy arrays as
 * the layers report; and the texts for a Q-Former as they come from Python. */
#ifndef B2_PY_WATCH_H
#define B2_PY_WATCH_H

#include "python/py_array.h"
#include "python/py_common.h"

#include "model/qformer.h"

/* What to watch. */
typedef struct b2py_wishes {
    int hidden_states, attentions;
} b2py_wishes;

/* The arrays of one stage, filled group by group as its layers report. */
typedef struct b2py_track {
    const char *stage;
    const char *key;      /* of the result */
    int count;            /* arrays */
    int first;            /* layers before it are left out */
    int stride;           /* layer first + i fills array i / stride */
    b2py_place place;     /* where the arrays are */
    PyObject *arrays;     /* list of float32 arrays, owned */
    float **data;         /* [count], owned */
    int64_t *filled;      /* [count + 1], owned: floats so far; one more for what follows the last norm */
    int64_t size;         /* floats of an array */
} b2py_track;

enum { B2PY_MOST_TRACKS = 8 };

typedef struct b2py_recorder {
    b2_tap tap; /* first */
    b2py_place place; /* where the arrays are to be; set before the first is watched */
    b2py_track hidden[B2PY_MOST_TRACKS], attention[B2PY_MOST_TRACKS];
    int hidden_count, attention_count;
} b2py_recorder;

/* tracks[*count] gets its arrays; 0, or -1 with the exception set (b2py_recorder_release frees what there is). */
int b2py_add_track(b2py_track *tracks, int *count, b2py_state *state, b2py_track plan, int ndim, npy_intp *shape);
/* layers + 1 arrays of `shape` [ndim] for the hidden states of a stage. */
int b2py_watch_hidden(b2py_recorder *r, b2py_state *state, const char *stage, const char *key, int layers, int ndim,
                      npy_intp *shape);
/* An array of `shape` [4] for the attention weights of every `stride`-th layer. */
int b2py_watch_attention(b2py_recorder *r, b2py_state *state, const char *stage, const char *key, int layers,
                         int stride, npy_intp *shape);
/* For b2py_run_begin; NULL where nothing is watched. */
b2_tap *b2py_recorder_tap(b2py_recorder *r);
/* Puts what was recorded into a dict. */
int b2py_recorder_result(const b2py_recorder *r, PyObject *result);
void b2py_recorder_release(b2py_recorder *r);

/* Of the rows of one call of attention: how many weights there are, and b2_attention_weights into memory of the host or of the device. */
int64_t b2py_attention_size(const b2_attention_args *args);
int b2py_attention_weights(b2_ctx *ctx, float *weights, const b2_attention_args *args, b2_err *err);

/* What the Q-Former reads beside the pictures. */
typedef struct b2py_text {
    PyArrayObject *ids, *offsets, *mask; /* owned */
    b2_texts texts;
    const b2_texts *given; /* NULL: none */
} b2py_text;

/* `object`: None, or a tuple (ids, offsets, mask or None). `items`: how many texts there must be; -1: any number. 0, or -1
 * with an exception. */
int b2py_read_text(b2py_text *in, PyObject *object, int64_t items);
/* Tokens of each text where all have the same number, which is what watching them needs; -1 with the exception set. */
int64_t b2py_text_length(const b2py_text *in, int64_t items);
void b2py_text_release(b2py_text *in);

#endif
