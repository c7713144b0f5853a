#include "generate/draw.h"

#include <math.h>

static void philox(uint32_t word[4], uint32_t key0, uint32_t key1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)word[0] * 0xD2511F53u, b = (uint64_t)word[2] * 0xCD9E8D57u;
        uint32_t w1 = word[1], w3 = word[3];
        word[0] = (uint32_t)(b >> 32) ^ w1 ^ key0;
        word[1] = (uint32_t)b;
        word[2] = (uint32_t)(a >> 32) ^ w3 ^ key1;
        word[3] = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

b2_draws b2_draws_of(uint64_t seed, uint64_t item, uint32_t row, int64_t step)
{
    /* The stream of a row has a key of its own, made from its names; the last word keeps it apart from every draw. */
    uint32_t word[4] = {(uint32_t)item, (uint32_t)(item >> 32), row, 1};
    philox(word, (uint32_t)seed, (uint32_t)(seed >> 32));
    return (b2_draws){{word[0], word[1]}, (uint32_t)step};
}

typedef struct block {
    int64_t number; /* -1: none yet */
    uint32_t word[4];
} block;

static double gumbel(const b2_draws *draws, block *now, int64_t i)
{
    if (now->number != i / 4) {
        *now = (block){i / 4, {(uint32_t)(i / 4), draws->step, 0, 0}};
        philox(now->word, draws->key[0], draws->key[1]);
    }
    double u = ((double)now->word[i % 4] + 0.5) * 0x1p-32; /* never 0 or 1 */
    return -log(-log(u));
}

/* g lies between -3.14 and 22.9: a score that is further behind the largest can not win, and needs no draw. */
static const float CHANCELESS = 26.1f;

int64_t b2_draws_one(const b2_draws *draws, const float *scores, int64_t n)
{
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        top = scores[i] > top ? scores[i] : top;
    block now = {.number = -1};
    int64_t best = 0;
    double most = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (!(scores[i] >= top - CHANCELESS))
            continue;
        double race = (double)scores[i] + gumbel(draws, &now, i);
        if (race > most) {
            most = race;
            best = i;
        }
    }
    return best;
}

void b2_draws_race(const b2_draws *draws, float *races, const float *scores, int64_t n)
{
    block now = {.number = -1};
    for (int64_t i = 0; i < n; i++)
        races[i] = scores[i] == -INFINITY ? -INFINITY : (float)((double)scores[i] + gumbel(draws, &now, i));
}
