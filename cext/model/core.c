#include "model/core.h"

#include <stdio.h>

#include "base/cpu.h"

enum { DS_MAX_THREADS = 512 };

static ds_status choose_kernels(const char *isa, const ds_kernels **out, ds_error *err) {
    int n;
    const ds_kernels *const *all = ds_kernels_available(&n);
    char names[160];
    size_t used = 0;
    if ((*out = ds_kernels_find(isa))) return DS_OK;
    names[0] = '\0';
    for (int i = 0; i < n && used < sizeof names; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", all[i]->isa);
    ds_fail(err, DS_EINVAL, "instruction set `%s` is not available on this machine", isa ? isa : ds_cpu_isa_override());
    snprintf(err->hint, sizeof err->hint, "use one of: %s", names);
    return err->status;
}

ds_status ds_core_create(const ds_gguf *metadata, ds_source source, int layer_begin, int layer_end, bool ends,
                         ds_sublayer sublayer, int n_threads, const char *isa, ds_core *out, ds_error *err) {
    ds_core c = {0};
    ds_status st;
    if (n_threads < 0 || n_threads > DS_MAX_THREADS)
        return ds_fail(err, DS_EINVAL, "threads is %d, expected 1 to %d", n_threads, DS_MAX_THREADS);
    if ((st = ds_config_read(metadata, source, &c.config, err)) != DS_OK) return st;
    if (layer_end < 0) layer_end = c.config.n_layer;
    if (layer_begin < 0 || layer_end > c.config.n_layer) {
        return ds_fail(err, DS_EINVAL, "layer %d is not in the model's 0 to %d", layer_begin, c.config.n_layer - 1);
    }
    if ((st = choose_kernels(isa, &c.kern, err)) != DS_OK) return st;
    if ((st = ds_weights_bind(&c.config, source, layer_begin, layer_end, ends, sublayer, &c.weights, err)) != DS_OK)
        return st;
    if ((st = ds_rope_create(&c.config, &c.rope, err)) == DS_OK &&
        (st = ds_pool_create(n_threads ? n_threads : ds_cpu_default_threads(), &c.pool, err)) == DS_OK) {
        *out = c;
        pthread_mutex_init(&out->lock, NULL);
        return DS_OK;
    }
    ds_rope_release(&c.rope);
    ds_weights_release(&c.weights);
    return st;
}

void ds_core_release(ds_core *core) {
    ds_pool_destroy(core->pool);
    ds_scratch_release(&core->scratch);
    ds_rope_release(&core->rope);
    ds_weights_release(&core->weights);
    pthread_mutex_destroy(&core->lock);
}

/* Sizes come in powers of two, so that growing prompts do not map scratch again and again. */
static int step_capacity(int n_tok) {
    int n = 1;
    while (n < n_tok) n *= 2;
    return n;
}

ds_status ds_core_run(ds_core *core, ds_step *step, ds_error *err) {
    ds_status st;
    pthread_mutex_lock(&core->lock);
    st = ds_scratch_reserve(&core->scratch, &core->config, core->kern, ds_pool_size(core->pool),
                            step_capacity(step->n_tok), err);
    if (st == DS_OK) {
        step->config = &core->config;
        step->weights = &core->weights;
        step->kern = core->kern;
        step->rope = &core->rope;
        step->scratch = &core->scratch;
        ds_step_run(core->pool, step);
    }
    pthread_mutex_unlock(&core->lock);
    return st;
}
