/* plan.h: which experts a step runs in one layer, over which tokens. */
#pragma once

#include <stdint.h>

/* Slot s, of the slots grouped by expert, holds token slot_token[s]. Experts without tokens do not appear. */
typedef struct ds_plan {
    int n_active;
    int *expert, *first, *count; /* (n_active): each one's number, its first slot, its tokens */
    int32_t *slot_token;         /* (n_slots) */
    int *slot_of;                /* (n_tok, n_used): the slot of a token's k-th expert */
    int *place;                  /* (n_expert): room to count in */
} ds_plan;

/* Group the choices ids (n_tok, n_used), each below n_expert, by expert, tokens in order. The arrays are the caller's,
 * n_active of them at most the lesser of n_expert and the slots. */
void ds_plan_build(ds_plan *plan, int n_expert, int n_tok, int n_used, const int32_t *ids);
