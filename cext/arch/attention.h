/* attention.h: the kinds of attention. A kind is a row here and a file beside it: what a file says of it, what the cache
 * keeps of a position, which tensors a layer has. How it is run is a row of each backend (backend/cpu/attention.c). */
#pragma once

#include "arch/config.h"

struct ds_reader;
struct ds_binder;
struct ds_layer;

enum { DS_CACHE_ROWS = 2 /* most sorts of rows that a layer keeps: keys, values */ };

/* Rows that each layer keeps of a position: `count` (1, or one for each head) of a head and a tail (kernels/attention.h). */
typedef struct ds_cache_rows {
    int n, n_tail, count;
} ds_cache_rows;

typedef struct ds_attention_kind {
    const char *name;
    /* Widths from the metadata, and their checks. */
    void (*read)(struct ds_reader *r, ds_config *c);
    /* What a layer keeps of a position; returns how many sorts. */
    int (*cached)(const ds_config *c, ds_cache_rows out[DS_CACHE_ROWS]);
    /* The largest rope.scaling.yarn_log_multiplier; 0 where YaRN leaves the scale of the scores alone. */
    double yarn_log_most;
    /* A layer's matrices between its norm and the output's projection. */
    void (*bind)(struct ds_binder *b, struct ds_layer *layer, int il);
} ds_attention_kind;

extern const ds_attention_kind DS_LATENT_ATTENTION, DS_PLAIN_ATTENTION;

/* The row of a model's kind. */
static inline const ds_attention_kind *ds_attention(const ds_config *c) {
    static const ds_attention_kind *const KINDS[DS_ATTENTION_KINDS] = {
        [DS_ATTENTION_LATENT] = &DS_LATENT_ATTENTION,
        [DS_ATTENTION_PLAIN] = &DS_PLAIN_ATTENTION,
    };
    return KINDS[c->attention];
}
