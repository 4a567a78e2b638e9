#include "memory/slots.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "memory/readers.h"

enum { HEAT_TOKENS = 64 };
static const double MOST_WORTH = 1e100;

/* What a slot of a layer's experts takes. */
static size_t slot_bytes(const ds_weights *w, int il) {
    const ds_expert x = ds_residency_bound(w, il, 0);
    size_t bytes = 0;
    for (int i = 0; i < DS_PIECES; i++) bytes += ds_read_room(ds_piece_bytes(ds_expert_piece(&x, i)));
    return bytes;
}

static int first_moe(const ds_config *c, const ds_weights *w) {
    return c->n_layer_dense > w->layer_begin ? c->n_layer_dense : w->layer_begin;
}

/* The pools, without slots: sizes, and layers of each in n. *out is the caller's to free. */
static int find_pools(const ds_config *c, const ds_weights *w, int *pool_of, ds_slot_pool *pools) {
    int n = 0;
    for (int il = first_moe(c, w); il < w->layer_end; il++) {
        const size_t bytes = slot_bytes(w, il);
        int p = 0;
        while (p < n && pools[p].slot_bytes != bytes) p++;
        if (p == n) pools[n++] = (ds_slot_pool){.slot_bytes = bytes};
        pools[p].n++;
        if (pool_of) pool_of[il - w->layer_begin] = p;
    }
    return n;
}

size_t ds_slots_least(const ds_config *c, const ds_weights *w) {
    ds_slot_pool *pools = calloc((size_t)(w->layer_end - w->layer_begin) + 1, sizeof *pools);
    const int n = pools ? find_pools(c, w, NULL, pools) : 0;
    size_t bytes = 0;
    for (int p = 0; p < n; p++) bytes += pools[p].slot_bytes;
    free(pools);
    return bytes;
}

/* Of each pool's experts the same share. */
static void share_out(ds_slots *s, size_t bytes) {
    double all = 0, least = 0;
    for (int p = 0; p < s->n_pools; p++) {
        all += (double)s->pools[p].slot_bytes * s->pools[p].n * s->n_expert;
        least += (double)s->pools[p].slot_bytes;
    }
    const double share = all > least ? ((double)bytes - least) / (all - least) : 1;
    for (int p = 0; p < s->n_pools; p++) {
        const int most = s->pools[p].n * s->n_expert, n = 1 + (int)(share * (most - 1));
        s->pools[p].first = s->n;
        s->pools[p].n = n < most ? n : most;
        s->n += s->pools[p].n;
    }
}

ds_status ds_slots_fill(ds_slots *s, ds_error *err) {
    for (int p = 0; p < s->n_pools; p++) {
        ds_slot_pool *pool = &s->pools[p];
        pool->bytes = pool->slot_bytes * (size_t)pool->n;
        if (!(pool->memory = ds_pages_new(pool->bytes)))
            return ds_fail(err, DS_ENOMEM, "no memory for %d experts (%.1f MiB)", pool->n,
                           (double)pool->bytes / (1 << 20));
        for (int i = 0; i < pool->n; i++)
            s->slots[pool->first + i].memory = pool->memory + (size_t)i * pool->slot_bytes;
    }
    return DS_OK;
}

/* Counts of a run before this one, as heat that has lasted. */
static void warm(ds_slots *s, const ds_config *c, const uint64_t *uses) {
    const double lasting = 1 / (1 - exp2(-1.0 / HEAT_TOKENS));
    for (int il = s->weights->layer_begin; il < s->weights->layer_end; il++) {
        const uint64_t *row = uses + (size_t)il * (size_t)s->n_expert;
        double all = 0;
        for (int e = 0; e < s->n_expert; e++) all += (double)row[e];
        for (int e = 0; e < s->n_expert && all > 0; e++)
            s->heat[ds_slots_at(s, il, e)] = (double)row[e] / all * c->n_expert_used * lasting;
    }
}

ds_status ds_slots_create(const ds_config *config, const ds_weights *weights, size_t bytes, const uint64_t *uses,
                          ds_slots *out, ds_error *err) {
    const size_t n_layer = (size_t)(weights->layer_end - weights->layer_begin), n = n_layer * (size_t)config->n_expert,
                 least = ds_slots_least(config, weights);
    ds_slots s = {.weights = weights,
                  .n_expert = config->n_expert,
                  .pools = calloc(n_layer + 1, sizeof *s.pools),
                  .pool_of = calloc(n_layer + 1, sizeof *s.pool_of),
                  .slot_of = calloc(n + 1, sizeof *s.slot_of),
                  .heat = calloc(n + 1, sizeof *s.heat),
                  .worth = 1,
                  .usual = (double)config->n_expert_used / config->n_expert};
    ds_status st = DS_OK;
    if (bytes < least)
        st = ds_fail(err, DS_EINVAL, "%zu bytes for routed experts, which are read %zu at a time", bytes, least);
    else if (!s.pools || !s.pool_of || !s.slot_of || !s.heat) st = ds_fail(err, DS_ENOMEM, "no memory for slots");
    if (st == DS_OK) {
        s.n_pools = find_pools(config, weights, s.pool_of, s.pools);
        share_out(&s, bytes);
        for (size_t i = 0; i < n; i++) s.slot_of[i] = -1;
        if (!(s.slots = calloc((size_t)s.n + 1, sizeof *s.slots)))
            st = ds_fail(err, DS_ENOMEM, "no memory for %d slots", s.n);
    }
    if (st == DS_OK && uses) warm(&s, config, uses);
    if (st == DS_OK) *out = s;
    else ds_slots_release(&s);
    return st;
}

void ds_slots_release(ds_slots *s) {
    for (int p = 0; s->pools && p < s->n_pools; p++) ds_pages_release(s->pools[p].memory, s->pools[p].bytes);
    free(s->slots);
    free(s->pools);
    free(s->pool_of);
    free(s->slot_of);
    free(s->heat);
    *s = (ds_slots){0};
}

size_t ds_slots_offset(const ds_slots *s, int il, int i) {
    const ds_expert x = ds_residency_bound(s->weights, il, 0);
    size_t at = 0;
    for (int j = 0; j < i; j++) at += ds_read_room(ds_piece_bytes(ds_expert_piece(&x, j)));
    return at;
}

unsigned char *ds_slots_room(const ds_slots *s, const ds_slot *slot, int i) {
    return slot->memory + ds_slots_offset(s, slot->il, i);
}

void ds_slots_step(ds_slots *s, int n_tok) {
    const size_t n = (size_t)(s->weights->layer_end - s->weights->layer_begin) * (size_t)s->n_expert;
    s->worth *= exp2((double)n_tok / HEAT_TOKENS);
    if (s->worth < MOST_WORTH) return;
    for (size_t i = 0; i < n; i++) s->heat[i] /= s->worth;
    s->worth = 1;
}

/* Uses spread evenly over the step's tokens, of which the first are worth less than the last. */
void ds_slots_use(ds_slots *s, int il, int e, int n, int n_tok) {
    const double fade = exp2(-1.0 / HEAT_TOKENS);
    s->heat[ds_slots_at(s, il, e)] += s->worth * n / n_tok * (1 - pow(fade, n_tok)) / (1 - fade);
}

/* What an expert's place in memory is worth: its chance to be chosen by a token, as its uses tell it, less the usual chance
 * for the whole round of layers until its own layer's turn. Without that, layers to come are at a loss against those that
 * the token has been through, whose uses have just been counted (cext/NOTES.md); between steps all are at one. */
static double value(const ds_slots *s, const ds_slot *slot, int now, double chance_of_heat) {
    const int n = s->weights->layer_end - s->weights->layer_begin, ahead = (slot->il - now + n - 1) % n + 1;
    const double chance = s->heat[ds_slots_at(s, slot->il, slot->e)] * chance_of_heat;
    return now < 0 ? chance : chance - s->usual * ahead / n;
}

/* The slot of the least value that may be taken, or NULL. */
static ds_slot *least(const ds_slots *s, const ds_slot_pool *pool, int now, bool force) {
    const double chance_of_heat = (1 - exp2(-1.0 / HEAT_TOKENS)) / s->worth;
    ds_slot *best = NULL;
    double lowest = DBL_MAX;
    for (ds_slot *slot = s->slots + pool->first; slot < s->slots + pool->first + pool->n; slot++) {
        if (slot->state == DS_SLOT_FREE) return slot;
        const bool idle = slot->state == DS_SLOT_READY || (slot->state == DS_SLOT_WAITING && !slot->n_begun);
        if (!idle || slot->held || ((slot->promised || slot->kept) && !force)) continue;
        const double worth = value(s, slot, now, chance_of_heat);
        if (worth < lowest) best = slot, lowest = worth;
    }
    return best;
}

void ds_slots_drop(ds_slots *s, ds_slot *slot) {
    if (slot->state != DS_SLOT_FREE) s->slot_of[ds_slots_at(s, slot->il, slot->e)] = -1;
    *slot = (ds_slot){.memory = slot->memory};
}

ds_slot *ds_slots_victim(const ds_slots *s, int il, int now, bool force) {
    const ds_slot_pool *pool = ds_slots_pool(s, il);
    ds_slot *slot = least(s, pool, now, false);
    return !slot && force ? least(s, pool, now, true) : slot;
}

void ds_slots_give(ds_slots *s, ds_slot *slot, int il, int e) {
    slot->state = DS_SLOT_WAITING;
    slot->il = il, slot->e = e, slot->n_left = DS_PIECES;
    s->slot_of[ds_slots_at(s, il, e)] = (int)(slot - s->slots);
}
