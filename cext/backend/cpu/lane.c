/* lane.c: taps, the one thing a lane does that is not a line or two. */
#include "backend/cpu/lane.h"

#include <string.h>

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
