/* slots.h: slots for routed experts that come and go: which expert each holds, and which goes next. Experts of a size share
 * a pool of slots that fit. Their memory is the host's (ds_slots_fill) or the caller's affair. Knows no drive and no lock:
 * who asks holds one. */
#pragma once

#include "memory/residency.h"

enum { DS_PIECES = 3 /* gate, up, down */ };

typedef enum ds_slot_state {
    DS_SLOT_FREE,
    DS_SLOT_WAITING, /* some of its pieces are not being read yet */
    DS_SLOT_READING,
    DS_SLOT_READY,
    DS_SLOT_FAILED,
} ds_slot_state;

typedef struct ds_slot {
    ds_slot_state state;
    int il, e; /* what it holds, or is to hold */
    bool held; /* the layer begun needs it */
    bool streamed; /* it came for the layer begun */
    bool promised; /* a layer to come may need it */
    bool kept; /* another piece of the step may need it */
    bool ahead; /* it was taken for that layer */
    bool failed;
    int n_begun, n_left; /* pieces: begun to be read, and not yet read */
    unsigned char *memory; /* or NULL, where it is not the host's */
} ds_slot;

/* Slots of one size. */
typedef struct ds_slot_pool {
    size_t slot_bytes, bytes;
    int first, n;
    unsigned char *memory;
} ds_slot_pool;

typedef struct ds_slots {
    const ds_weights *weights;
    int n_expert, n, n_pools;
    ds_slot *slots; /* (n) */
    ds_slot_pool *pools; /* (n_pools) */
    int *pool_of; /* (layers) */
    int *slot_of; /* (layers, n_expert) or -1 */
    /* How often an expert is used of late: its uses a token, each worth half of one DS_HEAT_TOKENS later. Not the uses
     * fade but new ones are worth more, until all are scaled down. */
    double *heat; /* (layers, n_expert) */
    double worth; /* of a use now */
    double usual; /* chance that a token chooses an expert: n_expert_used / n_expert */
} ds_slots;

/* Slots for the routed experts of weights in `bytes` of memory, empty and without it. DS_EINVAL where they hold not one of
 * each size. */
ds_status ds_slots_create(const ds_config *config, const ds_weights *weights, size_t bytes, const uint64_t *uses,
                          ds_slots *out, ds_error *err);
/* Give them memory. */
ds_status ds_slots_fill(ds_slots *slots, ds_error *err);
void ds_slots_release(ds_slots *slots);
size_t ds_slots_least(const ds_config *config, const ds_weights *weights); /* bytes for one of each size */

static inline size_t ds_slots_at(const ds_slots *s, int il, int e) {
    return (size_t)(il - s->weights->layer_begin) * (size_t)s->n_expert + (size_t)e;
}
static inline const ds_slot_pool *ds_slots_pool(const ds_slots *s, int il) {
    return &s->pools[s->pool_of[il - s->weights->layer_begin]];
}
/* The slot of an expert, or NULL. */
static inline ds_slot *ds_slots_find(const ds_slots *s, int il, int e) {
    const int at = s->slot_of[ds_slots_at(s, il, e)];
    return at < 0 ? NULL : &s->slots[at];
}
/* Where in its slot piece i of an expert of layer il begins. */
size_t ds_slots_offset(const ds_slots *s, int il, int i);
/* Where it begins in memory; whole blocks around it are read there. */
unsigned char *ds_slots_room(const ds_slots *s, const ds_slot *slot, int i);
static inline const ds_mat *ds_expert_piece(const ds_expert *x, int i) {
    return i == 0 ? &x->gate : i == 1 ? &x->up : &x->down;
}
static inline size_t ds_piece_bytes(const ds_mat *m) { return m->row_bytes * (size_t)m->rows; }

/* A step of n_tok tokens has begun. */
void ds_slots_step(ds_slots *s, int n_tok);
/* Of its tokens, n chose expert e. */
void ds_slots_use(ds_slots *s, int il, int e, int n, int n_tok);
/* The slot to give to an expert of layer il, while layer `now` is under way: a free one, or of those that nobody needs the
 * one of the least worth; with force, also one that is promised or kept, and not being read. NULL where there is none.
 * now -1: between steps, when no layer has had its turn before another. */
ds_slot *ds_slots_victim(const ds_slots *s, int il, int now, bool force);
/* A free slot is to hold an expert that has none: WAITING. */
void ds_slots_give(ds_slots *s, ds_slot *slot, int il, int e);
/* It holds nothing any more. */
void ds_slots_drop(ds_slots *s, ds_slot *slot);
