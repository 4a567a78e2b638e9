/* placement.h: which device computes which part of a model. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "arch/config.h"
#include "backend/backend.h"
#include "backend/device.h"

typedef enum ds_part {
    DS_PART_ENDS,         /* the embeddings, the final norm and the head */
    DS_PART_ATTENTION,    /* of layers */
    DS_PART_FEED_FORWARD, /* of layers: dense, or the router, the shared experts and the routed ones */
    DS_PART_EXPERTS,      /* of layers, some routed experts alone */
    DS_PART_COUNT
} ds_part;

/* A part, or the same part of several layers, to a device. Of rules about the same, the last counts. */
typedef struct ds_rule {
    ds_part part;
    int device; /* 0: the model's own processor; i: devices[i - 1] of the placement */
    int layer_begin, layer_end; /* not of the ends */
    int expert_begin, expert_end; /* of experts */
} ds_rule;

typedef struct ds_placement {
    const ds_device *devices;
    int n_devices;
    const ds_rule *rules;
    int n_rules;
} ds_placement;

/* Of a placement, or NULL: whether a device computes all that reads the tensor of this name, from a copy of its own.
 * Small ones, which others look at, and routed experts, which have places of their own, are none. */
bool ds_placement_takes(const void *placement, const char *name);

struct ds_residency;

/* Check the rules and carry them out; the routed experts' part goes to the residency. rules may be none. */
ds_status ds_places_create(const ds_config *config, const ds_placement *placement, struct ds_residency *residency,
                           ds_places *out, ds_error *err);
void ds_places_release(ds_places *places);
