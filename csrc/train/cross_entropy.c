/* losses[i] = log(sum over v of exp(logits[i][v] - most)) + most - logits[i][target],  most = max over v
 *
 * The sum runs in double: its rounding does not grow with the vocabulary. Owns nothing. */
#include "train/cross_entropy.h"

#include <math.h>

#include "core/pool.h"

typedef struct job {
    float *losses;
    b2_tensor logits;
    const int64_t *targets;
    int64_t ignore_index;
} job;

static float loss_of(const float *x, int64_t n, int64_t target)
{
    float most = -INFINITY;
    double sum = 0.0;
    for (int64_t v = 0; v < n; v++)
        most = x[v] > most ? x[v] : most;
    for (int64_t v = 0; v < n; v++)
        sum += expf(x[v] - most);
    return (float)(log(sum) + ((double)most - x[target]));
}

static void row(void *argument, int64_t i, int worker)
{
    const job *j = argument;
    (void)worker;
    j->losses[i] = j->targets[i] == j->ignore_index
                       ? 0.0f
                       : loss_of(j->logits.data + i * j->logits.ld, j->logits.cols, j->targets[i]);
}

int b2_cross_entropy(b2_ctx *ctx, float *losses, b2_tensor logits, const int64_t *targets, int64_t ignore_index,
                     b2_err *err)
{
    for (int64_t i = 0; i < logits.rows; i++)
        if (targets[i] != ignore_index && (targets[i] < 0 || targets[i] >= logits.cols))
            return b2_fail(err, B2_E_INDEX, "cross_entropy: target %lld at place %lld, expected 0..%lld or %lld",
                           (long long)targets[i], (long long)i, (long long)logits.cols - 1, (long long)ignore_index);
    job j = {losses, logits, targets, ignore_index};
    return b2_pool_run(ctx->pool, logits.rows, row, &j, ctx->cancel, err);
}
