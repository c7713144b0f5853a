/* Between Python and csrc/generate: options in, results out. Used by py_search.c and py_model.c. */
#ifndef B2_PY_SEARCH_H
#define B2_PY_SEARCH_H

#include "python/py_common.h"

#include "generate/generate.h"

typedef struct b2py_words {
    int32_t *ids;     /* [offsets[count]] */
    int64_t *offsets; /* [count + 1] */
    int64_t count;
} b2py_words;

/* What the pointers in parsed options point to. Start from {0}; free with b2py_options_release, also after an error. */
typedef struct b2py_options_storage {
    int32_t *eos_ids;
    int32_t *suppress_ids;
    int32_t *begin_suppress_ids;
    int32_t *forced_bos_ids;
    int32_t *forced_eos_ids;
    b2py_words bad_words;
    b2py_words biased;
    float *biases;
} b2py_options_storage;

/* A dict with these keys (see blip2c.generation.core_options):
 *   max_length, max_new_tokens, min_new_tokens: int, or None where unset; min_length: int
 *   num_beams, num_return_sequences, no_repeat_ngram_size, pad_id: int
 *   length_penalty, repetition_penalty: float;  early_stopping: True, False or "never"
 *   eos_ids, suppress_ids: sequence of int;  bad_words: sequence of sequences of int
 * and, where they are wanted,
 *   begin_suppress_ids, forced_bos_ids, forced_eos_ids: sequence of int
 *   biased: sequence of sequences of int, with biases: as many floats
 *   decay_factor: float, with decay_start: int;  remove_invalid_values, renormalize_logits: bool
 *   do_sample: bool, and if it is True seed, top_k: int and
 *     temperature, top_h, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: float
 * A missing, unknown or wrong one gives B2_E_VALUE or B2_E_TYPE naming it. Values are judged by b2_generate. */
int b2py_parse_options(PyObject *options, b2_generate_opts *opts, b2py_options_storage *storage, b2_err *err);
void b2py_options_release(b2py_options_storage *storage);

/* {"ids": int64 [rows, max_new], "lengths": int64 [rows], "scores": float32 [rows], "beam_indices": int32 [rows, max_new] or
 * None, "steps": int}, copied. */
PyObject *b2py_generated_dict(const b2_generated *generated);

#endif
