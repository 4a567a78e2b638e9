/* attention.h: the kinds of attention (arch/attention.h) as the processor runs them, one row each, and what they share. */
#pragma once

#include "backend/cpu/step.h"

enum {
    DS_GROUP_ROWS = 64, /* most query rows (a token's heads) that share a pass over the cache */
    DS_MIN_PART = 128, /* positions below which splitting a pass does not pay */
    DS_MAX_PARTS = 48, /* tasks that a step of few tokens is split into */
};

typedef struct ds_cpu_attention_kind {
    /* Memory of its own for steps of n_tok tokens: what the workers share, and one worker's. */
    void *(*room)(ds_carver *c, const ds_config *config, int n_tok);
    void *(*lane_room)(ds_carver *c, const ds_config *config, int n_tok);
    /* How the step's sequences attend; one worker, before the first layer. */
    void (*plan)(const ds_step *step);
    /* Layer il, by all workers: the rows of the step's tokens into the cache. */
    void (*remember)(const ds_lane *lane, const ds_layer *layer, int il);
    /* The same, and the step's heads filled; they are whole at a barrier behind it. */
    void (*attend)(const ds_lane *lane, const ds_layer *layer, int il);
} ds_cpu_attention_kind;

extern const ds_cpu_attention_kind DS_CPU_LATENT_ATTENTION, DS_CPU_PLAIN_ATTENTION;

/* The row of a model's kind. */
const ds_cpu_attention_kind *ds_cpu_attention_of(const ds_config *c);

/* The input of a layer's attention, normalised and packed for the kinds of products asked for. */
const ds_act *ds_attend_input(const ds_lane *lane, const ds_layer *layer, int il, unsigned kinds);

/* Where a part of n_pos positions begins, of n_parts that workers claim in their order; n_pos for part n_parts. */
int ds_attend_part_begin(int n_pos, int n_parts, int part);

/* Join the parts of one query row's positions, `stride` rows apart, into out (n). */
void ds_attend_join(const ds_kernels *kern, int n_parts, size_t stride, const float *m, const float *l,
                    const float *acc, size_t ld, int n, float *out);
