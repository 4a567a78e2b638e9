#include "arch/plan.h"

#include <string.h>

void ds_plan_build(ds_plan *plan, int n_expert, int n_tok, int n_used, const int32_t *ids) {
    int n = n_tok * n_used, slot = 0, *place = plan->place;
    memset(place, 0, (size_t)n_expert * sizeof *place);
    for (int i = 0; i < n; i++) place[ids[i]]++;
    plan->n_active = 0;
    for (int e = 0; e < n_expert; e++) {
        if (!place[e]) continue;
        plan->expert[plan->n_active] = e;
        plan->first[plan->n_active] = slot;
        plan->count[plan->n_active++] = place[e];
        slot += place[e];
        place[e] = slot - place[e];
    }
    for (int i = 0; i < n; i++) {
        plan->slot_of[i] = place[ids[i]]++;
        plan->slot_token[plan->slot_of[i]] = i / n_used;
    }
}
