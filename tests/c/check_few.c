/* Searches by shortlists against searches by whole rows, over random options: the same tokens, lengths, beams and bits of
 * scores. Arguments: the first seed, and how many. Prints how many rows were asked for whole, and how many shortlists made. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "generate/generate.h"
#include "generate/scores.h"

enum { ROWS_MOST = 64, VOCABULARY_MOST = 2300, IDS = 40, K_MOST = B2_SHORTLIST_MOST, LISTED_MOST = 1024 };

typedef struct fake_step {
    b2_step step; /* first */
    int levels;   /* logits are one of so many values; 0: any */
    int crowds;   /* some rows of a shortlist say that they are crowded */
    int rows_per_place;
    uint64_t state[ROWS_MOST];
    float *last;  /* [ROWS_MOST, V] */
    int32_t ids[ROWS_MOST * K_MOST], crowded[ROWS_MOST];
    float values[ROWS_MOST * K_MOST], tops[ROWS_MOST], *listed_values;
    double sums[ROWS_MOST];
} fake_step;

static long whole_rows, shortlists;

static uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

static int64_t draw(uint64_t *seed, int64_t below)
{
    *seed = mix(*seed + 0x632be59bd9b4e019u);
    return (int64_t)(*seed >> 20) % below;
}

static void make_logits(const fake_step *f, float *to, uint64_t state)
{
    for (int64_t v = 0; v < f->step.vocabulary; v++) {
        uint64_t x = mix(state ^ mix((uint64_t)v + 1));
        to[v] = f->levels ? (float)(x % (uint64_t)f->levels) : (float)((double)(x >> 40) / (double)(1 << 21)) - 4.0f;
    }
}

static int fake_prefill(b2_step *step, int64_t n, const int32_t *places, const b2_item *items, float *logits, b2_err *err)
{
    fake_step *f = (fake_step *)step;
    (void)err;
    for (int64_t i = 0; i < n; i++) {
        uint64_t state = 7;
        for (int64_t j = 0; j < items[i].length; j++)
            state = mix(state ^ (uint64_t)(items[i].ids[j] + 2));
        for (int j = 0; j < f->rows_per_place; j++)
            f->state[places[i] * f->rows_per_place + j] = state;
        make_logits(f, (logits ? logits : f->last) + i * step->vocabulary, state);
    }
    return 0;
}

static int fake_advance(b2_step *step, int64_t n, const int32_t *row, const int32_t *parent, const int32_t *token,
                        float *logits, b2_err *err)
{
    fake_step *f = (fake_step *)step;
    uint64_t before[ROWS_MOST];
    (void)err;
    memcpy(before, f->state, sizeof before);
    for (int64_t i = 0; i < n; i++) {
        f->state[row[i]] = mix(before[parent[i]] ^ (uint64_t)(token[i] + 2));
        make_logits(f, (logits ? logits : f->last) + i * step->vocabulary, f->state[row[i]]);
    }
    return 0;
}

static void fake_leave(b2_step *step, int32_t place)
{
    (void)step;
    (void)place;
}

static int fake_plan(b2_step *step, int64_t rows, const b2_choice *choice, b2_err *err)
{
    (void)step;
    if (rows > ROWS_MOST || choice->k > K_MOST || choice->listed_ld > LISTED_MOST)
        return b2_fail(err, B2_E_INTERNAL, "planned %lld rows, %d, %lld", (long long)rows, choice->k,
                       (long long)choice->listed_ld);
    return 0;
}

static void list_row(fake_step *f, int64_t i, const b2_shortlist *list)
{
    int64_t vocabulary = f->step.vocabulary;
    float row[VOCABULARY_MOST], *values = f->values + i * list->k;
    memcpy(row, f->last + i * vocabulary, (size_t)vocabulary * sizeof *row);
    f->tops[i] = row[b2_scores_argmax(row, vocabulary)];
    f->sums[i] = list->adds_up ? b2_scores_sum(row, vocabulary, f->tops[i]) : (double)NAN;
    for (int64_t j = i * list->listed_ld; j < (i + 1) * list->listed_ld; j++)
        if (list->listed[j] >= 0 && list->listed[j] < vocabulary) {
            f->listed_values[j] = f->last[i * vocabulary + list->listed[j]];
            row[list->listed[j]] = -INFINITY;
        }
    f->crowded[i] = f->crowds && mix(f->state[0] + (uint64_t)i) % 5 == 0;
    for (int c = 0; c < list->k; c++) {
        int64_t best = b2_scores_argmax(row, vocabulary);
        int none = f->crowded[i] || row[best] == -INFINITY;
        values[c] = none ? -INFINITY : row[best];
        f->ids[i * list->k + c] = none ? -1 : (int32_t)best;
        row[best] = -INFINITY;
    }
}

static int fake_shortlist(b2_step *step, int64_t n, b2_shortlist *list, b2_err *err)
{
    fake_step *f = (fake_step *)step;
    (void)err;
    for (int64_t i = 0; i < n; i++)
        list_row(f, i, list);
    list->sums = f->sums;
    list->tops = f->tops;
    list->crowded = f->crowded;
    list->values = f->values;
    list->ids = f->ids;
    list->listed_values = f->listed_values;
    shortlists += n;
    return 0;
}

static int fake_logits(b2_step *step, int64_t row, float *logits, b2_err *err)
{
    fake_step *f = (fake_step *)step;
    (void)err;
    memcpy(logits, f->last + row * step->vocabulary, (size_t)step->vocabulary * sizeof *logits);
    whole_rows++;
    return 0;
}

/* ---- random options ---- */

typedef struct arrays {
    int32_t ids[8][IDS];
    int64_t words[2][IDS + 1];
    float biases[IDS];
    int32_t prompts[8 * IDS];
    int64_t offsets[9];
} arrays;

static const int32_t *some_ids(arrays *a, int which, int64_t count, int64_t vocabulary, uint64_t *seed)
{
    for (int64_t i = 0; i < count; i++)
        a->ids[which][i] = (int32_t)draw(seed, vocabulary);
    return a->ids[which];
}

static int64_t some_words(int64_t *offsets, uint64_t *seed)
{
    int64_t count = draw(seed, 4);
    offsets[0] = 0;
    for (int64_t w = 0; w < count; w++)
        offsets[w + 1] = offsets[w] + 1 + draw(seed, 2);
    return count;
}

static b2_generate_opts random_options(arrays *a, int64_t vocabulary, uint64_t *seed)
{
    b2_generate_opts o = {.max_length = -1, .max_new_tokens = 1 + draw(seed, 12), .min_new_tokens = draw(seed, 6) - 2};
    o.num_beams = draw(seed, 3) == 0 ? 1 : 1 + (int)draw(seed, 5);
    o.num_return_sequences = 1 + (int)draw(seed, o.num_beams);
    o.min_length = draw(seed, 2) * draw(seed, 12);
    o.length_penalty = (double)draw(seed, 5) - 1.5;
    o.early_stopping = (b2_early_stopping)draw(seed, 3);
    o.repetition_penalty = draw(seed, 2) ? 1.0f : 0.7f + 0.2f * (float)draw(seed, 5);
    o.no_repeat_ngram_size = draw(seed, 2) ? 0 : (int)draw(seed, 4);
    o.eos_count = draw(seed, 4);
    o.eos_ids = some_ids(a, 0, o.eos_count, vocabulary, seed);
    o.pad_id = 1;
    o.suppress_count = draw(seed, 3) * draw(seed, vocabulary < 20 ? 3 : 9);
    o.suppress_ids = some_ids(a, 1, o.suppress_count, vocabulary, seed);
    o.begin_suppress_count = draw(seed, 3);
    o.begin_suppress_ids = some_ids(a, 2, o.begin_suppress_count, vocabulary, seed);
    o.bad_word_count = some_words(a->words[0], seed);
    o.bad_word_offsets = a->words[0];
    o.bad_words = some_ids(a, 3, a->words[0][o.bad_word_count], vocabulary, seed);
    o.biased_count = some_words(a->words[1], seed);
    o.biased_offsets = a->words[1];
    o.biased = some_ids(a, 4, a->words[1][o.biased_count], vocabulary, seed);
    for (int64_t w = 0; w < o.biased_count; w++)
        a->biases[w] = (float)draw(seed, 9) - 4.0f;
    o.biases = a->biases;
    o.decays = o.eos_count > 0 && draw(seed, 4) == 0;
    o.decay_start = draw(seed, 4);
    o.decay_factor = 1.3;
    o.temperature = o.top_p = o.typical_p = 1.0;
    return o;
}

static b2_prompts random_prompts(arrays *a, int64_t vocabulary, uint64_t *seed)
{
    b2_prompts p = {.rows = 1 + draw(seed, 5), .ids = a->prompts, .offsets = a->offsets};
    a->offsets[0] = 0;
    for (int64_t b = 0; b < p.rows; b++) {
        a->offsets[b + 1] = a->offsets[b] + 1 + draw(seed, 9);
        for (int64_t i = a->offsets[b]; i < a->offsets[b + 1]; i++)
            a->prompts[i] = (int32_t)draw(seed, vocabulary + 1) - 1;
    }
    return p;
}

/* ---- comparing ---- */

static int search(b2_generated *out, fake_step *f, int by_shortlist, const b2_prompts *prompts, const b2_search_size *size,
                  const b2_generate_opts *opts, b2_pool *pool, b2_err *err)
{
    f->step.plan = by_shortlist ? fake_plan : NULL;
    f->step.shortlist = by_shortlist ? fake_shortlist : NULL;
    f->step.logits = by_shortlist ? fake_logits : NULL;
    return b2_generate(out, prompts, size, opts, &f->step, NULL, pool, NULL, err);
}

static int differ(const b2_generated *a, const b2_generated *b)
{
    size_t rows = (size_t)a->rows, ids = rows * (size_t)a->max_new * sizeof *a->ids;
    return a->rows != b->rows || a->max_new != b->max_new || memcmp(a->ids, b->ids, ids) != 0 ||
           memcmp(a->lengths, b->lengths, rows * sizeof *a->lengths) != 0 ||
           memcmp(a->scores, b->scores, rows * sizeof *a->scores) != 0 || !a->beam_rows != !b->beam_rows ||
           (a->beam_rows && memcmp(a->beam_rows, b->beam_rows, ids) != 0);
}

static int check(uint64_t number, b2_pool *pool, fake_step *f)
{
    static const int64_t vocabularies[] = {9, 30, 77, 500, 2300};
    static const int levels[] = {0, 0, 0, 3, 40};
    uint64_t seed = mix(number + 99);
    arrays a;
    f->step.vocabulary = vocabularies[draw(&seed, 5)];
    f->levels = levels[draw(&seed, 5)];
    f->crowds = draw(&seed, 4) == 0;
    b2_generate_opts opts = random_options(&a, f->step.vocabulary, &seed);
    b2_prompts prompts = random_prompts(&a, f->step.vocabulary, &seed);
    b2_search_size size = b2_generate_size(&prompts, &opts, 1 + draw(&seed, 12));
    b2_generated with = {0}, without = {0};
    b2_err err_with = {0}, err_without = {0};
    f->rows_per_place = (int)b2_generate_rows_per_item(&opts);
    int status = search(&without, f, 0, &prompts, &size, &opts, pool, &err_without);
    int same = search(&with, f, 1, &prompts, &size, &opts, pool, &err_with) == status;
    same = same && (status < 0 ? strcmp(err_with.message, err_without.message) == 0 : !differ(&with, &without));
    if (!same)
        fprintf(stderr, "seed %llu: %d beams, vocabulary %lld, levels %d: '%s' and '%s'\n", (unsigned long long)number,
                opts.num_beams, (long long)f->step.vocabulary, f->levels, err_with.message, err_without.message);
    b2_generated_release(&with);
    b2_generated_release(&without);
    return same ? 0 : -1;
}

int main(int argc, char **argv)
{
    b2_err err = {0};
    uint64_t first = argc > 2 ? strtoull(argv[1], NULL, 10) : 0, count = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    b2_pool *pool = b2_pool_create(1, &err);
    fake_step *f = b2_alloc_zeroed(1, sizeof *f, "step", &err);
    f->step.prefill = fake_prefill;
    f->step.advance = fake_advance;
    f->step.leave = fake_leave;
    f->last = b2_alloc(ROWS_MOST * VOCABULARY_MOST, sizeof *f->last, "logits", &err);
    f->listed_values = b2_alloc(ROWS_MOST * LISTED_MOST, sizeof *f->listed_values, "logits", &err);
    int bad = 0;
    for (uint64_t i = first; i < first + count; i++)
        bad |= check(i, pool, f) < 0;
    printf("%ld %ld\n", whole_rows, shortlists);
    b2_free(f->last);
    b2_free(f->listed_values);
    b2_free(f);
    b2_pool_destroy(pool);
    return bad;
}
