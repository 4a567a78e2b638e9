#include "arch/tap.h"

#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    bool is_int;
} POINTS[DS_TAP_COUNT] = {
#define P(id, name, integer, width) [DS_TAP_##id] = {name, integer},
    DS_TAP_POINTS(P)
#undef P
};

static bool outside_blocks(ds_tap_point point) { return point == DS_TAP_INP_EMBD || point == DS_TAP_RESULT_NORM; }

bool ds_tap_parse(const ds_config *config, const char *name, ds_tap_point *point, int *il) {
    const char *dash = strrchr(name, '-');
    size_t size = dash ? (size_t)(dash - name) : strlen(name);
    char *end = NULL;
    long layer = dash ? strtol(dash + 1, &end, 10) : -1;
    if (dash && (end == dash + 1 || *end || layer < 0 || layer >= config->n_layer)) return false;
    if (dash && (dash[1] < '0' || dash[1] > '9' || (dash[1] == '0' && dash[2]))) return false; /* one spelling each */
    for (int p = 0; p < DS_TAP_COUNT; p++) {
        if (strlen(POINTS[p].name) != size || memcmp(POINTS[p].name, name, size) != 0) continue;
        if (outside_blocks((ds_tap_point)p) != !dash) return false;
        *point = (ds_tap_point)p;
        *il = (int)layer;
        return ds_tap_exists(config, *point, *il);
    }
    return false;
}

int ds_tap_width(const ds_config *c, ds_tap_point point) {
    switch (point) {
#define P(id, name, integer, width) \
    case DS_TAP_##id:               \
        return width;
        DS_TAP_POINTS(P)
#undef P
    default:
        return 0;
    }
}

bool ds_tap_is_int(ds_tap_point point) { return POINTS[point].is_int; }

bool ds_tap_within(ds_sublayer sublayer, ds_tap_point point) {
    if (sublayer == DS_SUBLAYER_ATTENTION) return point <= DS_TAP_FFN_NORM;
    return sublayer == DS_SUBLAYER_BOTH || point >= DS_TAP_FFN_NORM;
}

bool ds_tap_exists(const ds_config *config, ds_tap_point point, int il) {
    bool experts = point == DS_TAP_ROUTER_LOGITS || point == DS_TAP_EXPERTS || point == DS_TAP_EXPERT_WEIGHTS ||
                   point == DS_TAP_EXPERT_HIDDEN || point == DS_TAP_SHARED_HIDDEN;
    if (ds_tap_width(config, point) == 0) return false;
    if (experts) return il >= config->n_layer_dense;
    return point != DS_TAP_DENSE_HIDDEN || il < config->n_layer_dense;
}
