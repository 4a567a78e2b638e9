/* device.h: what a model can compute on. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

/* Whether a GPU computes a prompt's routed experts that lie in the host's memory, which are copied to it. */
typedef enum ds_copying {
    DS_COPY_AUTO, /* as many as that is faster for */
    DS_COPY_NEVER,
    DS_COPY_ALWAYS, /* all */
    DS_COPY_COUNT
} ds_copying;

typedef struct ds_device {
    const char *kind; /* "cpu" or "vulkan" */
    int n_threads;    /* of the processor; 0: what is fastest here */
    const char *isa;  /* of the processor; NULL or "": the best */
    const char *name; /* of a GPU: its number, or letters of its name; NULL or "": the best that is no software */
    uint64_t memory; /* of a GPU: bytes of its own that weights, copies, caches and steps may take; 0: what there is */
    ds_copying copying; /* of a GPU */
    bool short_steps; /* of a GPU: none of more than DS_CHUNK tokens, whose room other parts of the model are to have */
    uint64_t hot; /* of a GPU: bytes of its own for routed experts that come and go (backend/vulkan/hot.h) */
} ds_device;

/* Whether it computes from a copy of its weights, in memory of its own. */
bool ds_device_copies(const ds_device *device);

struct ds_facts;
struct ds_backend;

/* A backend on the device, number `number` of its model. Number 0 may take the thread that waits for it as its own. */
ds_status ds_device_open(const ds_device *device, const struct ds_facts *facts, int number, struct ds_backend **out,
                         ds_error *err);
