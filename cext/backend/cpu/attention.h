/* attention.h: the kinds of attention (arch/attention.h) as the processor runs them, one row each. */
#pragma once

#include "backend/cpu/step.h"

typedef struct ds_cpu_attention_kind {
    /* How the step's sequences attend; one worker, before the first layer. */
    void (*plan)(const ds_step *step);
    /* Layer il, by all workers: the rows of the step's tokens into the cache; then attention, added to the residual. */
    void (*remember)(const ds_lane *lane, const ds_layer *layer, int il);
    void (*attend)(const ds_lane *lane, const ds_layer *layer, int il);
} ds_cpu_attention_kind;

extern const ds_cpu_attention_kind DS_CPU_LATENT_ATTENTION;

/* The row of a model's kind. */
const ds_cpu_attention_kind *ds_cpu_attention_of(const ds_config *c);
