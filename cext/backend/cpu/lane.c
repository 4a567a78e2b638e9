/* lane.c: a worker's rows of a step, and taps of them. */
#include "backend/cpu/lane.h"

#include <string.h>

ds_lane ds_lane_of(const ds_worker *worker, const ds_step *step) {
    ds_lane_scratch *own = &step->scratch->lanes[worker->ith];
    ds_lane lane = {
        .worker = worker, .step = step, .own = own, .solo = step->n_tok == 1, .t1 = 1, .x = own->x, .xn = own->xn};
    if (!lane.solo) { /* whole tiles of rows, because packs are laid out by tiles */
        int tiles = (step->n_tok + DS_PANEL_ROWS - 1) / DS_PANEL_ROWS;
        lane.t0 = tiles * worker->ith / worker->nth * DS_PANEL_ROWS;
        lane.t1 = tiles * (worker->ith + 1) / worker->nth * DS_PANEL_ROWS;
        if (lane.t0 > step->n_tok) lane.t0 = step->n_tok;
        if (lane.t1 > step->n_tok) lane.t1 = step->n_tok;
        lane.x = step->scratch->x;
        lane.xn = step->scratch->xn;
    }
    return lane;
}

const ds_tap_entry *ds_lane_tapped(const ds_lane *lane, ds_tap_point point, int il) {
    const ds_tap *tap = lane->step->tap;
    for (int i = 0; tap && i < tap->n; i++) {
        if (tap->entries[i].point == point && tap->entries[i].il == il) return &tap->entries[i];
    }
    return NULL;
}

void ds_lane_tap(const ds_lane *lane, ds_tap_point point, int il, const void *data, int ld) {
    const ds_tap_entry *entry = ds_lane_tapped(lane, point, il);
    size_t row = (size_t)ds_tap_width(lane->step->config, point) * 4; /* float and int32 alike */
    if (!entry) return;
    ds_barrier(lane->worker);
    for (int t = 0; lane->worker->ith == 0 && t < lane->step->n_tok; t++) {
        memcpy((unsigned char *)entry->data + (size_t)(entry->row + t) * row,
               (const unsigned char *)data + (size_t)t * (size_t)ld * 4, row);
    }
    ds_barrier(lane->worker);
}
