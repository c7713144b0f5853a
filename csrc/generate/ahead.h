/* What a step is told so that it can choose tokens by itself and run ahead of the search (ops/choice.h). The search need not
 * know whether it does: what it asks for next is either there already or computed then. Private to csrc/generate. */
#ifndef B2_GENERATE_AHEAD_H
#define B2_GENERATE_AHEAD_H

#include "generate/search.h"

/* s->choice, of a search by shortlists: `listing` has what a choice says of them. */
int b2_ahead_reserve(b2_search *search, const b2_choice *listing, b2_err *err);
void b2_ahead_release(b2_search *search);

/* Before the search asks for logits of its packed rows: what they have said and how they stand. */
void b2_ahead_tell(b2_search *search);

#endif
