/* Arithmetic on one row of logits [V]. Portable C written so that compilers vectorise it; the order of operations is
 * fixed by the row alone. Owns nothing. */
#ifndef B2_GENERATE_SCORES_H
#define B2_GENERATE_SCORES_H

#include <stdint.h>

/* 0 if no element is NaN or +Inf (-Inf is a forbidden token, and legal). */
int b2_scores_broken(const float *logits, int64_t vocabulary);

/* Index of the largest, the first of equals. */
int64_t b2_scores_argmax(const float *scores, int64_t vocabulary);

/* sum_j exp(x_j - top); top is the largest. */
double b2_scores_sum(const float *scores, int64_t vocabulary, float top);

/* In place: x_i - max - log(sum_j exp(x_j - max)), in fp32 as torch.log_softmax. */
void b2_scores_log_softmax(float *scores, int64_t vocabulary);

void b2_scores_fill(float *scores, int64_t vocabulary, float value);

/* scores[i] += addend */
void b2_scores_add(float *scores, int64_t vocabulary, float addend);

#endif
