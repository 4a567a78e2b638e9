/* lane.h: what every block does with a worker's rows: normalise, pack for the products that follow, tap. */
#pragma once

#include "backend/cpu/step.h"

/* The kinds of pack that a set of products takes. */
static inline unsigned ds_kind_of(const ds_mat *m) { return m->data ? 1u << ds_format_get(m->format)->act : 0; }

static inline const void *ds_act_for(const ds_act *act, const ds_mat *m) {
    return act->pack[ds_format_get(m->format)->act];
}

/* Wait for the other workers' rows; nothing to wait for where every worker has made its own. */
static inline void ds_lane_sync(const ds_lane *lane) {
    if (!lane->solo) ds_barrier(lane->worker);
}

/* Pack the lane's rows of x (n_tok, k) for the kinds asked for: into `own` when solo, else into its part of `shared`.
 * Returns the act to give to products; it is whole after ds_lane_sync. */
static inline const ds_act *ds_lane_pack(const ds_lane *lane, unsigned kinds, int k, const float *x, const ds_act *own,
                                         const ds_act *shared) {
    const ds_act *act = lane->solo ? own : shared;
    for (int kind = 0; kind < DS_ACT_COUNT; kind++) {
        if (!(kinds & 1u << kind) || lane->t0 == lane->t1) continue;
        lane->step->kern->act_pack((ds_act_kind)kind, lane->t0, lane->t1, lane->step->n_tok, k, x, (size_t)k, NULL,
                                   act->pack[kind]);
    }
    return act;
}

/* y = rms_norm(x) * weight over the lane's rows. */
static inline void ds_lane_norm(const ds_lane *lane, int n, const float *x, const float *weight, float *y) {
    for (int t = lane->t0; t < lane->t1; t++) {
        lane->step->kern->rms_norm(n, x + (size_t)t * (size_t)n, weight, lane->step->config->rms_eps,
                                   y + (size_t)t * (size_t)n);
    }
}

/* y = silu(gate) * up of n values: in pieces whose number an int holds, whole vectors each. */
static inline void ds_lane_silu_mul(const ds_lane *lane, size_t n, const float *gate, const float *up, float *y) {
    const size_t most = (size_t)1 << 30;
    for (size_t at = 0; at < n; at += most)
        lane->step->kern->silu_mul((int)(n - at < most ? n - at : most), gate + at, up + at, y + at);
}

/* Record a tap of all rows of `data` (n_tok, ld), if it was asked for. Every worker calls it at the same place. */
void ds_lane_tap(const ds_lane *lane, ds_tap_point point, int il, const void *data, int ld);
/* The entry of a point, or NULL: the same answer on every worker. */
const ds_tap_entry *ds_lane_tapped(const ds_lane *lane, ds_tap_point point, int il);
