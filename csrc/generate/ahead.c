/* A choice owns its rows, history and slots; the ids of the options are the caller's. */
#include "generate/ahead.h"

#include <string.h>

#include "core/memory.h"

static void copy_rules(b2_choice *c, const b2_generate_opts *opts)
{
    c->repetition_penalty = opts->repetition_penalty;
    c->no_repeat_ngram_size = opts->no_repeat_ngram_size;
    c->min_length = opts->min_length;
    c->min_new_tokens = opts->min_new_tokens;
    c->decays = opts->decays;
    c->decay_start = opts->decay_start;
    c->decay_factor = opts->decay_factor;
    c->eos_count = opts->eos_count;
    c->eos_ids = opts->eos_count > 0 ? opts->eos_ids : NULL;
    c->suppress_count = opts->suppress_count;
    c->suppress_ids = opts->suppress_count > 0 ? opts->suppress_ids : NULL;
    c->bad_word_count = opts->bad_word_count;
    c->bad_words = opts->bad_word_count > 0 ? opts->bad_words : NULL;
    c->bad_word_offsets = opts->bad_word_count > 0 ? opts->bad_word_offsets : NULL;
    c->biased_count = opts->biased_count;
    c->biased = opts->biased_count > 0 ? opts->biased : NULL;
    c->biased_offsets = opts->biased_count > 0 ? opts->biased_offsets : NULL;
    c->biases = opts->biased_count > 0 ? opts->biases : NULL;
    c->beams = opts->num_beams;
    c->stops_when_full = opts->early_stopping == B2_EARLY_STOPPING_TRUE;
    c->stops_never = opts->early_stopping == B2_EARLY_STOPPING_NEVER;
    c->length_penalty = opts->length_penalty;
}

int b2_ahead_reserve(b2_search *s, const b2_choice *listing, b2_err *err)
{
    size_t rows = (size_t)(s->size.places * s->rows_per_seat);
    b2_choice *c = s->choice = b2_alloc(1, sizeof *c, "search ahead", err);
    if (!c)
        return -1;
    memcpy(c, listing, sizeof *c);
    copy_rules(c, s->opts);
    c->history_ld = s->size.longest + s->width;
    c->rows = b2_alloc_zeroed(rows, sizeof *c->rows, "search ahead", err);
    c->history = b2_alloc_zeroed(rows, (size_t)c->history_ld * sizeof *c->history, "search ahead", err);
    c->slots = b2_alloc_zeroed(rows, sizeof *c->slots, "search ahead", err);
    return c->rows && c->history && c->slots ? 0 : -1;
}

void b2_ahead_release(b2_search *s)
{
    if (!s->choice)
        return;
    void *blocks[] = {s->choice->rows, s->choice->history, s->choice->slots, s->choice};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        b2_free(blocks[i]);
    s->choice = NULL;
}

static void tell_row(b2_search *s, int64_t i)
{
    b2_choice *c = s->choice;
    int64_t r = s->row[i];
    const b2_seat *seat = &s->seats[r / s->rows_per_seat];
    const b2_item *item = &seat->item;
    int32_t *history = c->history + i * c->history_ld;
    memcpy(history, item->ids, (size_t)item->length * sizeof *history);
    memcpy(history + item->length, b2_search_said(s, r), (size_t)seat->step * sizeof *history);
    c->rows[i] = (b2_choice_row){.prompt = (int32_t)item->length,
                                 .skip = (int32_t)item->skip,
                                 .made = (int32_t)seat->step,
                                 .limit = (int32_t)seat->limit,
                                 .sum = s->chooser->addend ? s->chooser->addend(s, i) : 0.0f};
    c->slots[i] = s->chooser->slot ? s->chooser->slot(s, r) : B2_CHOICE_EMPTY;
}

void b2_ahead_tell(b2_search *s)
{
    if (!s->choice)
        return;
    /* Who may enter would not be in what has been computed ahead. */
    s->step->alone = s->source_ended;
    for (int64_t i = 0; s->source_ended && i < s->rows; i++)
        tell_row(s, i);
}
