/* experts.h: where a layer's routed experts are. Today all of them lie in the file's mapping; kernels take the pointers
 * that they are given here and ask no further, so that other tiers can answer instead. */
#pragma once

#include "quant/mat.h"

typedef struct ds_experts {
    ds_mat gate, up; /* n_expert x (n_ff_expert, n_embd) */
    ds_mat down; /* n_expert x (n_embd, n_ff_expert) */
} ds_experts;

typedef struct ds_expert {
    const void *gate, *up, *down;
} ds_expert;

static inline ds_expert ds_experts_get(const ds_experts *experts, int e) {
    return (ds_expert){ds_mat_block(&experts->gate, e), ds_mat_block(&experts->up, e), ds_mat_block(&experts->down, e)};
}
