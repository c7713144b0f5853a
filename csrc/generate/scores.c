#include "generate/scores.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, SUM_BLOCK = 1024 };

int b2_scores_broken(const float *logits, int64_t vocabulary)
{
    int broken = 0;
    for (int64_t i = 0; i < vocabulary; i++)
        broken |= !(logits[i] < INFINITY);
    return broken;
}

static float largest(const float *x, int64_t n)
{
    float lane[LANES];
    for (int j = 0; j < LANES; j++)
        lane[j] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++)
        lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int j = 1; j < LANES; j++)
        lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    return lane[0];
}

int64_t b2_scores_argmax(const float *scores, int64_t vocabulary)
{
    float top = largest(scores, vocabulary);
    int64_t i = 0;
    while (i + 1 < vocabulary && scores[i] != top)
        i++;
    return i;
}

/* max(x, bound), by masks: from a conditional compilers make a jump, which keeps the loop around it scalar. */
static inline float at_least(float x, float bound)
{
    int32_t x_bits, bound_bits, keep = -(int32_t)(x >= bound);
    memcpy(&x_bits, &x, sizeof x_bits);
    memcpy(&bound_bits, &bound, sizeof bound_bits);
    x_bits = (x_bits & keep) | (bound_bits & ~keep);
    memcpy(&x, &x_bits, sizeof x);
    return x;
}

/* exp(x) for x <= 0: 2^n * exp(r) with n = round(x / ln 2), |r| <= ln(2)/2, a degree-6 Taylor polynomial with
 * minimal-error last terms; relative error below 2e-7. Below -87 (-Inf included) the result is exp(-87) = 1.6e-38,
 * which a sum that holds exp(0) = 1 cannot notice. */
static inline float exp_negative(float x)
{
    const float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, to_integer = 12582912.0f;
    float clipped = at_least(x, -87.0f);
    float shifted = clipped * log2_e + to_integer; /* the integer lands in the low bits of the significand */
    float n = shifted - to_integer;
    float r = (clipped - n * ln2_high) - n * ln2_low;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* n <= SUM_BLOCK. Two loops, because compilers vectorise each alone and not both in one. */
static double sum_of_block(const float *x, int64_t n, float top)
{
    float e[SUM_BLOCK];
    float lane[LANES] = {0};
    for (int64_t i = 0; i < n; i++)
        e[i] = exp_negative(x[i] - top);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += e[i + j];
    double sum = 0.0;
    for (; i < n; i++)
        sum += e[i];
    for (int j = 0; j < LANES; j++)
        sum += lane[j];
    return sum;
}

double b2_scores_sum(const float *scores, int64_t vocabulary, float top)
{
    double sum = 0.0;
    for (int64_t i = 0; i < vocabulary; i += SUM_BLOCK)
        sum += sum_of_block(scores + i, vocabulary - i < SUM_BLOCK ? vocabulary - i : SUM_BLOCK, top);
    return sum;
}

void b2_scores_log_softmax(float *scores, int64_t vocabulary)
{
    float top = largest(scores, vocabulary);
    if (top == -INFINITY)
        return; /* everything was forbidden already: stays so */
    float log_sum = (float)log(b2_scores_sum(scores, vocabulary, top));
    for (int64_t i = 0; i < vocabulary; i++)
        scores[i] = (scores[i] - top) - log_sum;
}

void b2_scores_add(float *scores, int64_t vocabulary, float addend)
{
    for (int64_t i = 0; i < vocabulary; i++)
        scores[i] += addend;
}

void b2_scores_fill(float *scores, int64_t vocabulary, float value)
{
    for (int64_t i = 0; i < vocabulary; i++)
        scores[i] = value;
}
