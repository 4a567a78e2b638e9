/* core.h: what a model and a single block share: configuration, bound weights, kernels, threads, scratch. */
#pragma once

#include <pthread.h>

#include "backend/cpu/step.h"

typedef struct ds_core {
    ds_config config;
    ds_weights weights;
    const ds_kernels *kern;
    ds_pool *pool;
    ds_rope rope;
    ds_scratch scratch;
    pthread_mutex_t lock; /* one step at a time: the pool and the scratch are shared */
} ds_core;

/* Set up everything but the file: on failure nothing is kept. */
ds_status ds_core_create(const ds_gguf *metadata, ds_source source, int layer_begin, int layer_end, bool ends,
                         ds_sublayer sublayer, int n_threads, const char *isa, ds_core *out, ds_error *err);
void ds_core_release(ds_core *core);

/* Fill in the core's part of the step and run it. */
ds_status ds_core_run(ds_core *core, ds_step *step, ds_error *err);
