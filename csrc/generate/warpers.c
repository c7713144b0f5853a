/* Probabilities are fp32 values of sums taken in double, cumulative sums are double and compared in fp32, as torch does
 * on the CPU; its softmax differs from this one by the order of an fp32 sum, so a token whose probability meets a
 * threshold within an ulp or two may fall on the other side. Where upstream sorts the whole vocabulary, a heap gives
 * up just the tokens that are kept. Of equal scores at the edge of top_p the ones with larger ids are kept; torch.sort is
 * not stable, and keeps what its CPU's instruction set leaves there. */
#include "generate/warpers.h"

#include <float.h>
#include <math.h>

#include "core/integers.h"
#include "generate/scores.h"
#include "generate/topk.h"

enum { TOP_H_TOKENS = 100 };

typedef struct warp_scratch {
    b2_scored *sorted; /* [V]: b2_topk_scratch of any k, or a heap */
    float *values;     /* [V] */
} warp_scratch;

int64_t b2_warpers_scratch(int64_t vocabulary)
{
    return b2_round_up(vocabulary * (int64_t)sizeof(b2_scored), 64) + b2_round_up(vocabulary * (int64_t)sizeof(float), 64);
}

static warp_scratch divide(void *scratch, int64_t vocabulary)
{
    warp_scratch s = {.sorted = scratch};
    s.values = (float *)((char *)scratch + b2_round_up(vocabulary * (int64_t)sizeof(b2_scored), 64));
    return s;
}

static float largest(const float *scores, int64_t count)
{
    float top = -INFINITY;
    for (int64_t i = 0; i < count; i++)
        top = scores[i] > top ? scores[i] : top;
    return top;
}

/* sum_i exp(scores[i] - top); most scores are -Inf once top_k has been there. */
static double exp_sum(const float *scores, int64_t count, float top)
{
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++)
        if (scores[i] > -INFINITY)
            sum += expf(scores[i] - top);
    return sum;
}

static void softmax(float *probabilities, const float *scores, int64_t count)
{
    float top = largest(scores, count);
    double sum = exp_sum(scores, count, top);
    for (int64_t i = 0; i < count; i++)
        probabilities[i] = scores[i] > -INFINITY ? (float)(expf(scores[i] - top) / sum) : 0.0f;
}

static void drop_below(float *scores, const float *values, int64_t vocabulary, float bound, float always)
{
    for (int64_t i = 0; i < vocabulary; i++)
        if (values[i] < bound && scores[i] < always)
            scores[i] = -INFINITY;
}

static float kth_largest(const float *scores, int64_t vocabulary, int64_t k, b2_scored *sorted)
{
    k = k < vocabulary ? k : vocabulary;
    if (k == 1)
        return largest(scores, vocabulary);
    b2_topk(sorted, scores, vocabulary, k);
    return sorted[k - 1].value;
}

void b2_warp_temperature(float *scores, int64_t vocabulary, float temperature)
{
    for (int64_t i = 0; i < vocabulary; i++) {
        float score = scores[i] / temperature;
        scores[i] = score > FLT_MAX ? FLT_MAX : score; /* an infinity would make every probability NaN */
    }
}

void b2_warp_top_k(float *scores, int64_t vocabulary, int64_t top_k, void *scratch)
{
    float bound = kth_largest(scores, vocabulary, top_k, divide(scratch, vocabulary).sorted);
    drop_below(scores, scores, vocabulary, bound, INFINITY);
}

/* -sum p log p of the n largest, log p limited as torch.distributions limits it: 0 for a forbidden token. */
static float entropy(const float *probabilities, const float *log_probabilities, int64_t count)
{
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++)
        if (probabilities[i] > 0.0f)
            sum += probabilities[i] * log_probabilities[i];
    return (float)-sum;
}

static void log_softmax(float *out, const float *scores, int64_t count)
{
    float top = largest(scores, count);
    float shift = top + (float)log(exp_sum(scores, count, top));
    for (int64_t i = 0; i < count; i++)
        out[i] = scores[i] - shift;
}

/* The likeliest tokens (of the first hundred) whose entropies together stay within top_h of the whole. */
void b2_warp_top_h(float *scores, int64_t vocabulary, double top_h, void *scratch)
{
    float logits[TOP_H_TOKENS] = {0}, normalised[TOP_H_TOKENS] = {0}, p[TOP_H_TOKENS] = {0};
    int64_t n = vocabulary < TOP_H_TOKENS ? vocabulary : TOP_H_TOKENS, kept = 0;
    b2_scored *top = divide(scratch, vocabulary).sorted;
    b2_topk(top, scores, vocabulary, n);
    for (int64_t i = 0; i < n; i++)
        logits[i] = top[i].value;
    log_softmax(normalised, logits, n);
    softmax(p, normalised, n);
    float bound = entropy(p, normalised, n) * (float)top_h;
    double sum = 0.0;
    for (; kept < n; kept++) {
        sum += -p[kept] * logf(p[kept]); /* NaN for a forbidden token, as upstream: ends it */
        if (kept > 0 && !((float)sum <= bound))
            break;
    }
    b2_scores_fill(scores, vocabulary, -INFINITY);
    for (int64_t i = 0; i < kept; i++)
        scores[top[i].index] = top[i].value;
}

/* ---- a heap of tokens whose first is the next in order ---- */

/* Descending by value, of equals the larger index first: an ascending stable sort read from its end. */
static int comes_down(b2_scored a, b2_scored b)
{
    return a.value != b.value ? a.value > b.value : a.index > b.index;
}

/* Ascending by value, of equals the smaller index first. */
static int comes_up(b2_scored a, b2_scored b)
{
    return a.value != b.value ? a.value < b.value : a.index < b.index;
}

typedef int (*comes_first)(b2_scored a, b2_scored b);

static void sift(b2_scored *heap, int64_t count, int64_t i, comes_first before)
{
    b2_scored item = heap[i];
    for (int64_t child = 2 * i + 1; child < count; child = 2 * i + 1) {
        if (child + 1 < count && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], item))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = item;
}

/* The tokens that are not forbidden; returns how many. */
static int64_t heap_of(b2_scored *heap, const float *values, const float *scores, int64_t vocabulary,
                       comes_first before)
{
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary; i++)
        if (scores[i] > -INFINITY)
            heap[count++] = (b2_scored){values[i], (int32_t)i};
    for (int64_t i = count / 2 - 1; i >= 0; i--)
        sift(heap, count, i, before);
    return count;
}

/* Takes the first out and leaves it behind the heap that remains, at [count - 1]. */
static b2_scored pop(b2_scored *heap, int64_t count, comes_first before)
{
    b2_scored first = heap[0];
    heap[0] = heap[count - 1];
    heap[count - 1] = first;
    sift(heap, count - 1, 0, before);
    return first;
}

/* Upstream sums probabilities from the unlikeliest up and drops those whose sum is at most 1 - top_p. */
void b2_warp_top_p(float *scores, int64_t vocabulary, double top_p, int64_t keep, void *scratch)
{
    warp_scratch s = divide(scratch, vocabulary);
    float bound = (float)(1.0 - top_p);
    double left = 0.0;
    softmax(s.values, scores, vocabulary);
    for (int64_t i = 0; i < vocabulary; i++)
        left += s.values[i];
    int64_t count = heap_of(s.sorted, scores, scores, vocabulary, comes_down), kept = 0;
    while (kept < count && (kept < keep || (float)left > bound)) {
        left -= s.values[pop(s.sorted, count - kept, comes_down).index];
        kept++;
    }
    for (int64_t i = 0; i < count - kept; i++)
        scores[s.sorted[i].index] = -INFINITY;
}

/* Keeps what is at least min_p times as likely as the likeliest token. */
void b2_warp_min_p(float *scores, int64_t vocabulary, double min_p, int64_t keep, void *scratch)
{
    warp_scratch s = divide(scratch, vocabulary);
    softmax(s.values, scores, vocabulary);
    float bound = (float)min_p * largest(s.values, vocabulary);
    keep = keep < vocabulary ? keep : vocabulary;
    if (keep > 1) { /* the likeliest is never below the bound */
        b2_topk(s.sorted, s.values, vocabulary, keep);
        for (int64_t i = 0; i < keep; i++)
            s.values[s.sorted[i].index] = INFINITY;
    }
    drop_below(scores, s.values, vocabulary, bound, INFINITY);
}

/* Keeps the tokens whose -log p is nearest to the entropy, until their probabilities reach `mass`. */
void b2_warp_typical(float *scores, int64_t vocabulary, double mass, int64_t keep, void *scratch)
{
    warp_scratch s = divide(scratch, vocabulary);
    float *distance = s.values, top = largest(scores, vocabulary);
    double sum = exp_sum(scores, vocabulary, top), weighed = 0.0, reached = 0.0;
    float log_sum = (float)log(sum);
    for (int64_t i = 0; i < vocabulary; i++) {
        float normalised = (scores[i] - top) - log_sum;
        distance[i] = normalised;
        if (normalised > -INFINITY)
            weighed += normalised * expf(normalised);
    }
    float expected = (float)-weighed;
    for (int64_t i = 0; i < vocabulary; i++)
        distance[i] = fabsf(-distance[i] - expected);
    int64_t count = heap_of(s.sorted, distance, scores, vocabulary, comes_up), taken = 0;
    float bound = INFINITY;
    while (taken < count) {
        b2_scored next = pop(s.sorted, count - taken, comes_up);
        taken++;
        reached += (float)(expf(scores[next.index] - top) / sum);
        if (!((float)reached < (float)mass)) {
            bound = next.value;
            break;
        }
    }
    for (; taken < count && taken < keep; taken++)
        pop(s.sorted, count - taken, comes_up);
    for (int64_t i = 0; i < count - taken; i++) /* what is left in the heap: equals of the last one stay */
        if (s.sorted[i].value > bound)
            scores[s.sorted[i].index] = -INFINITY;
}

void b2_warp_epsilon(float *scores, int64_t vocabulary, double epsilon, int64_t keep, void *scratch)
{
    warp_scratch s = divide(scratch, vocabulary);
    float always = kth_largest(scores, vocabulary, keep, s.sorted);
    softmax(s.values, scores, vocabulary);
    drop_below(scores, s.values, vocabulary, (float)epsilon, always);
}

/* The bound of epsilon cutoff, lowered where the distribution is flat: min(epsilon, sqrt(epsilon) exp(-entropy)). */
void b2_warp_eta(float *scores, int64_t vocabulary, double epsilon, int64_t keep, void *scratch)
{
    warp_scratch s = divide(scratch, vocabulary);
    float always = kth_largest(scores, vocabulary, keep, s.sorted), top = largest(scores, vocabulary);
    float shift = top + (float)log(exp_sum(scores, vocabulary, top));
    softmax(s.values, scores, vocabulary);
    double sum = 0.0;
    for (int64_t i = 0; i < vocabulary; i++)
        if (s.values[i] > 0.0f)
            sum += s.values[i] * (scores[i] - shift);
    float flat = sqrtf((float)epsilon) * expf((float)sum);
    drop_below(scores, s.values, vocabulary, flat < (float)epsilon ? flat : (float)epsilon, always);
}
