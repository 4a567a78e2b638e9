#include "arch/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

ds_status ds_file_source_open(const ds_gguf *gguf, ds_file_source *out, ds_error *err) {
    bool *asked = calloc(ds_gguf_n_tensors(gguf) + 1, sizeof *asked);
    if (!asked)
        return ds_fail(err, DS_ENOMEM, "%s: no memory for %zu tensors", ds_gguf_label(gguf), ds_gguf_n_tensors(gguf));
    *out = (ds_file_source){gguf, asked};
    return DS_OK;
}

void ds_file_source_close(ds_file_source *file) {
    free(file->asked);
    *file = (ds_file_source){0};
}

static const ds_tensor *find(const void *ctx, const char *name) {
    const ds_file_source *file = ctx;
    const ds_tensor *t = ds_gguf_tensor_find(file->gguf, name);
    if (t) file->asked[t - ds_gguf_tensor_at(file->gguf, 0)] = true;
    return t;
}

ds_source ds_file_source_view(ds_file_source *file) { return (ds_source){find, file, ds_gguf_label(file->gguf)}; }

static bool ends_in(const char *name, const char *end) {
    const size_t n = strlen(name), k = strlen(end);
    return n >= k && strcmp(name + n - k, end) == 0;
}

/* Whether a tensor that was not asked for would have changed the answers. */
static bool matters(const ds_config *c, const char *name) {
    int il, n = 0;
    if (sscanf(name, "blk.%d.%n", &il, &n) == 1 && n)
        return il < c->n_layer && !ends_in(name, ".attn_kv_b.weight"); /* the older form beside the split one */
    return strncmp(name, "rope_", 5) == 0;
}

ds_status ds_file_source_check(const ds_file_source *file, ds_config *config, ds_error *err) {
    const ds_gguf *g = file->gguf;
    const char *first = NULL;
    size_t n_left = 0;
    for (size_t i = 0; i < ds_gguf_n_tensors(g); i++) {
        const ds_tensor *t = ds_gguf_tensor_at(g, i);
        int il;
        if (file->asked[i]) continue;
        if (matters(config, t->name)) {
            ds_fail(err, DS_EUNSUPPORTED, "%s: tensor `%s` has no place in the model as this engine computes it",
                    ds_gguf_label(g), t->name);
            return ds_hint(err, "left out, it would make the answers wrong: a newer dsv2 may know it, or llama.cpp");
        }
        if (sscanf(t->name, "blk.%d.", &il) == 1) continue;
        if (!n_left++) first = t->name;
    }
    if (n_left)
        ds_note(&config->notes, "%zu tensors are no part of the text model and were left out: `%s`%s", n_left, first,
                n_left > 1 ? " and others" : "");
    return DS_OK;
}
