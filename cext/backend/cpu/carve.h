/* carve.h: pieces of one block of memory, sized up front: nothing is allocated in the token loop. */
#pragma once

#include "kernels/kernels.h"

/* A packed activation per kind; NULL where no product of the phase takes that kind. */
typedef struct ds_act {
    void *pack[DS_ACT_COUNT];
} ds_act;

/* Hands out aligned pieces of base; with base NULL it only measures. */
typedef struct ds_carver {
    unsigned char *base;
    size_t used;
    const ds_kernels *kern;
} ds_carver;

static inline void *ds_carve(ds_carver *c, size_t count, size_t item) {
    const size_t at = c->used;
    c->used += (count * item + DS_ACT_ALIGN - 1) / DS_ACT_ALIGN * DS_ACT_ALIGN;
    return c->base ? c->base + at : NULL;
}

static inline float *ds_carve_floats(ds_carver *c, size_t n) { return ds_carve(c, n, sizeof(float)); }

/* Room for n_tok rows of up to k values in every kind of pack. */
static inline ds_act ds_carve_act(ds_carver *c, int n_tok, int k) {
    ds_act a;
    k = (k + 31) / 32 * 32; /* a narrower row may be of whole blocks where the widest is not */
    for (int kind = 0; kind < DS_ACT_COUNT; kind++)
        a.pack[kind] = ds_carve(c, c->kern->act_bytes((ds_act_kind)kind, n_tok, k), 1);
    return a;
}
