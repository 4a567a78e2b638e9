/* loaded.h: all tensors of a file but the routed experts', read into memory of our own: what every token needs stays, and
 * takes nothing of the system's cache. */
#pragma once

#include "arch/config.h"
#include "memory/budget.h"
#include "memory/readers.h"

typedef struct ds_loaded {
    ds_source under;
    const ds_gguf *gguf;
    ds_tensor *tensors; /* (of the file) data in memory where it was read, NULL elsewhere */
    unsigned char *memory;
    size_t bytes;
    bool cached; /* read through the system's cache, which a file system has no way past */
} ds_loaded;

/* What reading them will take, or, of those that `which` is true of, did. */
size_t ds_loaded_bytes(const ds_gguf *gguf, const ds_config *config);
typedef bool ds_loaded_which(const void *ctx, const char *name);
size_t ds_loaded_bytes_of(const ds_gguf *gguf, const ds_config *config, ds_loaded_which *which, const void *ctx);
/* The file's mapping is left. DS_EIO, DS_ENOMEM, DS_ESTOPPED. */
ds_status ds_loaded_open(const ds_gguf *gguf, const ds_config *config, ds_source under, const ds_budget *budget,
                         ds_loaded *out, ds_error *err);
/* `under`, with data in memory where it was read. */
ds_source ds_loaded_view(ds_loaded *loaded);
/* Give the memory of these back: whoever reads them has a copy, and nothing here is read any more. */
void ds_loaded_forget(ds_loaded *loaded, ds_loaded_which *which, const void *ctx);
void ds_loaded_release(ds_loaded *loaded);
