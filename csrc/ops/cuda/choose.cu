/* The end of a step that chooses its own tokens (ops/choice.h), so that steps follow each other on the device.
 *
 * Two kernels. The first makes each row's shortlist, as the host would ask for it, and puts it into the log. The second, a block
 * per item, does what few.c, single.c and beam.c do with it: rules over the listed logits, the best of all beams, sums and
 * ended hypotheses, and then writes the tables that the next step reads. The last block to finish says whether there is one:
 * not behind the last step asked for, nor when all items are over, nor where a shortlist does not settle the choice.
 *
 * The host decides again by the same shortlists; where sums or powers differ in their last bit here, all that is lost is time.
 *
 * Memory: device copies of host arrays (b2_cuda_index), the caller's log and spare. */
#include "ops/cuda/cuda_ops.h"
#include "ops/cuda/shortlist.h"

namespace {

enum { THREADS = B2_SHORTLIST_THREADS, ROOM = B2_SHORTLIST_ROOM, BEAMS_MOST = B2_SHORTLIST_MOST };
const float LARGEST = 3.402823466e38f;

/* b2_choice_tables.turns. */
enum { TURN = 0, WANTED = B2_CHOICE_WANTED, ARRIVED, RUNNING, UNSETTLED };

/* Both structs with device copies in place of host arrays. */
struct view {
    b2_choice c;
    b2_choice_tables t;
    int64_t rows, vocabulary;
    size_t turn_bytes;
    cudaGraphConditionalHandle loop;
};

/* What the step of this turn leaves in the log. */
struct entry {
    b2_shortlist_parts list;
    int32_t *tokens, *parents; /* [N] chosen; packed rows */
};

__device__ __forceinline__ entry entry_of(const view &v, unsigned turn)
{
    char *at = (char *)v.t.log + B2_CHOICE_HEADER + turn * v.turn_bytes;
    entry e;
    e.list = b2_shortlist_parts_of(at, v.rows, v.c.k, v.c.listed_ld);
    e.tokens = e.list.listed + v.rows * v.c.listed_ld;
    e.parents = e.tokens + v.rows;
    return e;
}

__global__ void __launch_bounds__(THREADS) list_kernel(view v, b2_tensor logits)
{
    int64_t i = blockIdx.x, ld = v.c.listed_ld, length = (int64_t)v.c.rows[i].prompt + v.c.rows[i].made;
    entry e = entry_of(v, v.t.turns[TURN]);
    for (int64_t j = threadIdx.x; j < ld; j += THREADS) {
        int64_t said = j - v.c.fixed_count;
        int32_t id = -1;
        if (said < 0)
            id = v.c.fixed[j];
        else if (v.c.by_history && said < length)
            id = v.c.history[i * v.c.history_ld + said];
        e.list.listed[i * ld + j] = id;
    }
    __syncthreads();
    b2_shortlist_row(logits, e.list, i, v.c.beams > 1);
}

/* ---- rules: rules.c for one id ---- */

/* What a row has said. */
struct history {
    const int32_t *ids;
    int64_t length, skip, made;
};

__device__ __forceinline__ float at_most(float score)
{
    return score > LARGEST ? LARGEST : score;
}

__device__ bool is_one_of(const int32_t *ids, int64_t count, int32_t id)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] == id)
            return true;
    return false;
}

__device__ bool tail_is(const history &h, const int32_t *ids, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        if (n > h.length || h.ids[h.length - n + j] != ids[j])
            return false;
    return true;
}

__device__ float biased(const b2_choice &c, const history &h, float score, int32_t id)
{
    float sum = 0.0f;
    for (int64_t w = 0; w < c.biased_count; w++) {
        const int32_t *ids = c.biased + c.biased_offsets[w];
        int64_t last = c.biased_offsets[w + 1] - c.biased_offsets[w] - 1;
        if (ids[last] == id && tail_is(h, ids, last))
            sum = at_most(__fadd_rn(sum, c.biases[w]));
    }
    return at_most(__fadd_rn(score, sum));
}

__device__ bool repeats_ngram(const history &h, int64_t size, int32_t id)
{
    for (int64_t first = 0; size > 0 && first + size <= h.length; first++) {
        bool same = h.ids[first + size - 1] == id;
        for (int64_t j = 0; same && j < size - 1; j++)
            same = h.ids[first + j] >= 0 && h.ids[first + j] == h.ids[h.length - size + 1 + j];
        if (same)
            return true;
    }
    return false;
}

__device__ bool is_bad_word(const b2_choice &c, const history &h, int32_t id)
{
    for (int64_t w = 0; w < c.bad_word_count; w++) {
        const int32_t *word = c.bad_words + c.bad_word_offsets[w];
        int64_t last = c.bad_word_offsets[w + 1] - c.bad_word_offsets[w] - 1;
        if (word[last] == id && tail_is(h, word, last) && !(last == 0 && is_one_of(c.eos_ids, c.eos_count, id)))
            return true;
    }
    return false;
}

__device__ float decayed(const b2_choice &c, const history &h, float score)
{
    int64_t over = h.made - c.decay_start;
    if (over <= 0 || !(fabsf(score) <= LARGEST))
        return score;
    float factor = at_most((float)(pow(c.decay_factor, (double)over) - 1.0)); /* 0 * Inf would be NaN */
    factor = factor < -LARGEST ? -LARGEST : factor;
    return at_most(__fadd_rn(score, at_most(__fmul_rn(fabsf(score), factor))));
}

/* A row that goes on is behind its beginning: begin_suppress_ids have no say. */
__device__ float ruled(const b2_choice &c, const history &h, float score, int32_t id)
{
    bool ends = is_one_of(c.eos_ids, c.eos_count, id);
    if (c.biased_count > 0)
        score = biased(c, h, score, id);
    if (c.repetition_penalty != 1.0f && is_one_of(h.ids + h.skip, h.length - h.skip, id))
        score = score < 0.0f ? __fmul_rn(score, c.repetition_penalty) : at_most(__fdiv_rn(score, c.repetition_penalty));
    if (repeats_ngram(h, c.no_repeat_ngram_size, id) || is_bad_word(c, h, id))
        score = -INFINITY;
    if (ends && (h.length < c.min_length || h.made < c.min_new_tokens))
        score = -INFINITY;
    if (ends && c.decays)
        score = decayed(c, h, score);
    return is_one_of(c.suppress_ids, c.suppress_count, id) ? -INFINITY : score;
}

/* ---- choosing ---- */

__device__ __forceinline__ float value_of(b2_key key)
{
    unsigned order = (unsigned)(key >> 32);
    return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

__device__ __forceinline__ int32_t place_of(b2_key key)
{
    return (int32_t)~(unsigned)key;
}

/* The k best scores of row i, which is beam j of its item, into best [k]; 0 where there are no more. keys [ROOM] is scratch. */
__device__ void rank_row(const view &v, const entry &e, int64_t i, int j, b2_key *best, b2_key *keys)
{
    const b2_choice_row &row = v.c.rows[i];
    int k = v.c.k, count = k + (int)v.c.listed_ld;
    history h = {v.c.history + i * v.c.history_ld, (int64_t)row.prompt + row.made, row.skip, row.made};
    float top = e.list.tops[i], log_sum = v.c.beams > 1 ? (float)log(e.list.sums[i]) : 0.0f;
    for (int n = (int)threadIdx.x; n < count; n += THREADS) {
        bool listed = n >= k;
        int64_t at = listed ? i * v.c.listed_ld + n - k : i * k + n;
        int32_t id = listed ? e.list.listed[at] : e.list.ids[at];
        float score = listed ? e.list.listed_values[at] : e.list.values[at];
        bool there = id >= 0 && id < v.vocabulary;
        if (there && v.c.beams > 1)
            score = __fsub_rn(__fsub_rn(score, top), log_sum);
        if (there && listed)
            score = ruled(v.c, h, score, id);
        if (there && v.c.beams > 1)
            score = __fadd_rn(score, row.sum);
        keys[n] = there ? b2_key_of(score, j * v.vocabulary + id) : 0;
    }
    __syncthreads();
    b2_shared_keys list = {keys};
    b2_sort_keys(list, count);
    if (threadIdx.x == 0) {
        int kept = 0;
        for (int n = 0; n < count && kept < k; n++)
            if (n == 0 || keys[n] != keys[n - 1]) /* an id may be listed more than once */
                best[kept++] = keys[n];
        while (kept < k)
            best[kept++] = 0;
    }
    __syncthreads();
}

/* As choose_single and choose_beams of few.c. best: descending. */
__device__ bool settles(const view &v, const entry &e, int64_t first, const b2_key *best)
{
    bool settled = best[0] != 0 && value_of(best[0]) > -INFINITY;
    for (int j = 0; j < v.c.beams; j++)
        settled = settled && !e.list.crowded[first + j];
    for (int c = 0; settled && c + 1 < v.c.k; c++)
        settled = best[c + 1] != 0 && value_of(best[c]) > value_of(best[c + 1]);
    return settled;
}

/* What has been chosen for the rows of an item. */
struct choices {
    int32_t token[BEAMS_MOST], parent[BEAMS_MOST]; /* parent: beam */
    float sum[BEAMS_MOST];
    int over;
};

__device__ void choose_best(const view &v, int64_t i, const b2_key *best, choices *out)
{
    const b2_choice_row &row = v.c.rows[i];
    out->token[0] = place_of(best[0]);
    out->parent[0] = 0;
    out->sum[0] = 0.0f;
    out->over = row.over || row.made + 1 >= row.limit || is_one_of(v.c.eos_ids, v.c.eos_count, out->token[0]);
}

/* The worst of the slots makes way for a better hypothesis. */
__device__ void keep(float *slots, int beams, float score)
{
    int worst = 0;
    for (int j = 1; j < beams; j++)
        worst = slots[j] < slots[worst] ? j : worst;
    if (score > slots[worst])
        slots[worst] = score;
}

__device__ bool is_over(const view &v, const b2_choice_row &row, const float *slots, float best, bool all_end)
{
    float worst = slots[0];
    for (int j = 1; j < v.c.beams; j++)
        worst = fminf(worst, slots[j]);
    bool full = worst > B2_CHOICE_EMPTY;
    int length = v.c.stops_never && v.c.length_penalty > 0.0 ? row.limit : row.made + 1;
    bool improves = !full || best / (float)pow((double)length, v.c.length_penalty) > worst;
    return row.over || all_end || !improves || (full && v.c.stops_when_full);
}

/* As choose_running, choose_slots and judge of beam.c, where no two candidates are equal. */
__device__ void choose_running(const view &v, int64_t first, const b2_key *best, choices *out)
{
    const b2_choice_row &row = v.c.rows[first];
    float *slots = v.c.slots + first, power = (float)pow((double)(row.made + 1), v.c.length_penalty);
    int beams = v.c.beams, candidates = v.c.k - 1, running = 0;
    bool full = v.c.stops_when_full, last = row.made + 1 >= row.limit;
    for (int j = 0; j < beams; j++)
        full = full && slots[j] > B2_CHOICE_EMPTY;
    for (int c = 0; c < candidates; c++) {
        int32_t place = place_of(best[c]), token = (int32_t)(place % v.vocabulary);
        bool ends = last || is_one_of(v.c.eos_ids, v.c.eos_count, token);
        if (ends && c < beams && !full)
            keep(slots, beams, value_of(best[c]) / power);
        if (ends || running == beams)
            continue;
        out->token[running] = token;
        out->parent[running] = (int32_t)(place / v.vocabulary);
        out->sum[running++] = value_of(best[c]);
    }
    bool all_end = running == 0;
    for (; running < beams; running++) { /* nobody looks at these */
        out->token[running] = (int32_t)(place_of(best[0]) % v.vocabulary);
        out->parent[running] = 0;
        out->sum[running] = B2_CHOICE_EMPTY;
    }
    out->over = is_over(v, row, slots, out->sum[0], all_end);
}

/* ---- the next step ---- */

/* Rows take over what their parents have said, and their keys. */
__device__ void inherit(const view &v, int64_t first, const choices &chosen)
{
    const b2_choice_row &row = v.c.rows[first];
    int64_t ids = row.made, slots = v.t.suffix_lens[first], all = ids + slots, ld = v.c.history_ld + v.t.suffix_ld;
    for (int64_t n = threadIdx.x; n < v.c.beams * all; n += THREADS) {
        int64_t j = n / all, at = n % all, from = first + chosen.parent[j];
        v.t.spare[(first + j) * ld + at] = at < ids ? v.c.history[from * v.c.history_ld + row.prompt + at]
                                                    : v.t.suffix_slots[from * v.t.suffix_ld + at - ids];
    }
    __syncthreads();
    for (int64_t n = threadIdx.x; n < v.c.beams * all; n += THREADS) {
        int64_t j = n / all, at = n % all, to = first + j;
        int32_t value = v.t.spare[to * ld + at];
        if (at < ids)
            v.c.history[to * v.c.history_ld + row.prompt + at] = value;
        else
            v.t.suffix_slots[to * v.t.suffix_ld + at - ids] = value;
    }
    __syncthreads();
}

__device__ void go_on(const view &v, int64_t i, int32_t token, float sum, int over)
{
    b2_choice_row &row = v.c.rows[i];
    int32_t suffix = v.t.suffix_lens[i], cache_row = v.t.cache_rows[i] + v.t.cache_step;
    v.c.history[i * v.c.history_ld + row.prompt + row.made] = token;
    row.made++;
    row.sum = sum;
    row.over = over;
    v.t.ids[i] = token;
    v.t.positions[i]++;
    v.t.cache_rows[i] = cache_row;
    v.t.suffix_slots[i * v.t.suffix_ld + suffix] = cache_row;
    v.t.suffix_lens[i] = suffix + 1;
    if (v.t.key_mask)
        v.t.key_mask[i * v.t.key_mask_ld + v.t.prefix_lens[i] + suffix] = 1;
}

/* By one thread of each block; `items` blocks. The last one ends the turn. */
__device__ void end_turn(const view &v, unsigned turn, bool settled, int over, unsigned items)
{
    uint32_t *turns = v.t.turns;
    if (!settled)
        atomicAdd(&turns[UNSETTLED], 1u);
    if (!over)
        atomicAdd(&turns[RUNNING], 1u);
    __threadfence();
    if (atomicAdd(&turns[ARRIVED], 1u) != items - 1)
        return;
    bool again = atomicAdd(&turns[UNSETTLED], 0u) == 0 && atomicAdd(&turns[RUNNING], 0u) > 0 && turn + 1 < turns[WANTED];
    turns[ARRIVED] = turns[RUNNING] = 0;
    turns[TURN] = turn + 1;
    *(int32_t *)v.t.log = (int32_t)(turn + 1);
    cudaGraphSetConditional(v.loop, again);
}

__global__ void __launch_bounds__(THREADS) choose_kernel(view v)
{
    __shared__ b2_key keys[ROOM], best[ROOM];
    __shared__ choices chosen;
    __shared__ int settled;
    unsigned turn = v.t.turns[TURN];
    int beams = v.c.beams;
    int64_t first = (int64_t)blockIdx.x * beams;
    entry e = entry_of(v, turn);
    for (int j = 0; j < beams; j++)
        rank_row(v, e, first + j, j, best + j * v.c.k, keys);
    b2_shared_keys list = {best};
    b2_sort_keys(list, beams * v.c.k);
    if (threadIdx.x == 0) {
        settled = settles(v, e, first, best);
        if (settled && beams == 1)
            choose_best(v, first, best, &chosen);
        else if (settled)
            choose_running(v, first, best, &chosen);
    }
    __syncthreads();
    if (settled)
        for (int j = (int)threadIdx.x; j < beams; j += THREADS) {
            e.tokens[first + j] = chosen.token[j];
            e.parents[first + j] = (int32_t)first + chosen.parent[j];
        }
    /* Behind the last turn there may be no room for another token. */
    if (settled && turn + 1 < v.t.turns[WANTED]) {
        if (beams > 1)
            inherit(v, first, chosen);
        for (int j = (int)threadIdx.x; j < beams; j += THREADS)
            go_on(v, first + j, chosen.token[j], chosen.sum[j], chosen.over);
    }
    __syncthreads();
    if (threadIdx.x == 0)
        end_turn(v, turn, settled, settled ? chosen.over : 1, gridDim.x);
}

static_assert((int)B2_CHOICE_COUNTERS == UNSETTLED + 1, "counters of turns");
static_assert(BEAMS_MOST / 2 * (int)B2_SHORTLIST_MOST <= ROOM, "the candidates of all beams find room");

/* ---- the operation ---- */

/* *array becomes its device copy. */
template <class T> int copy(b2_ctx *ctx, T **array, int64_t count, b2_err *err)
{
    if (!*array || count == 0)
        return 0;
    *array = (T *)b2_cuda_index(ctx, (const void *)*array, (size_t)count * sizeof(T), err);
    return *array ? 0 : -1;
}

int copy_rules(b2_ctx *ctx, b2_choice *c, b2_err *err)
{
    int64_t bad = c->bad_word_count > 0 ? c->bad_word_offsets[c->bad_word_count] : 0;
    int64_t all_biased = c->biased_count > 0 ? c->biased_offsets[c->biased_count] : 0;
    return copy(ctx, &c->fixed, c->fixed_count, err) < 0 || copy(ctx, &c->eos_ids, c->eos_count, err) < 0 ||
                   copy(ctx, &c->suppress_ids, c->suppress_count, err) < 0 || copy(ctx, &c->bad_words, bad, err) < 0 ||
                   (bad > 0 && copy(ctx, &c->bad_word_offsets, c->bad_word_count + 1, err) < 0) ||
                   copy(ctx, &c->biased, all_biased, err) < 0 ||
                   (all_biased > 0 && copy(ctx, &c->biased_offsets, c->biased_count + 1, err) < 0) ||
                   copy(ctx, &c->biases, c->biased_count, err) < 0
               ? -1
               : 0;
}

/* The sizes are those that the step's operations ask for, so that these are the copies that they read. */
int copy_state(b2_ctx *ctx, view *v, b2_err *err)
{
    int64_t n = v->rows;
    b2_choice_tables *t = &v->t;
    return copy(ctx, &v->c.rows, n, err) < 0 || copy(ctx, &v->c.history, n * v->c.history_ld, err) < 0 ||
                   copy(ctx, &v->c.slots, n, err) < 0 || copy(ctx, &t->ids, n, err) < 0 ||
                   copy(ctx, &t->positions, n, err) < 0 || copy(ctx, &t->cache_rows, n, err) < 0 ||
                   copy(ctx, &t->suffix_lens, n, err) < 0 || copy(ctx, &t->suffix_slots, n * t->suffix_ld, err) < 0 ||
                   copy(ctx, &t->key_mask, n * t->key_mask_ld, err) < 0 || copy(ctx, &t->prefix_lens, n, err) < 0 ||
                   copy(ctx, &t->turns, (int64_t)B2_CHOICE_COUNTERS, err) < 0
               ? -1
               : 0;
}

} // namespace

int b2_cuda_choose(b2_ctx *ctx, const b2_choice *choice, const b2_choice_tables *tables, b2_tensor logits, b2_err *err)
{
    b2_cuda *q = b2_cuda_of(ctx);
    if (!q->repeating)
        return 0;
    view v = {};
    v.c = *choice;
    v.t = *tables;
    v.rows = logits.rows;
    v.vocabulary = logits.cols;
    v.turn_bytes = b2_choice_turn_bytes(b2_shortlist_bytes(v.rows, choice->k, choice->listed_ld), v.rows);
    v.loop = q->loop;
    if (choice->k + choice->listed_ld > ROOM || choice->beams > BEAMS_MOST / 2)
        return b2_fail(err, B2_E_INTERNAL, "choose: %d candidates and %lld listed ids of %d beams", choice->k,
                       (long long)choice->listed_ld, choice->beams);
    if (copy_rules(ctx, &v.c, err) < 0 || copy_state(ctx, &v, err) < 0)
        return -1;
    B2_LAUNCH(list_kernel, dim3((unsigned)v.rows), dim3(THREADS), 0, q->stream, v, logits);
    if (b2_cuda_launched("choose: shortlist", err) < 0)
        return -1;
    B2_LAUNCH(choose_kernel, dim3((unsigned)(v.rows / choice->beams)), dim3(THREADS), 0, q->stream, v);
    return b2_cuda_launched("choose", err);
}
