/* file.h: a GGUF as a source of tensors that knows which of them were asked for. One that nobody asks for would be left out
 * of the arithmetic without a word. */
#pragma once

#include "arch/config.h"

typedef struct ds_file_source {
    const ds_gguf *gguf;
    bool *asked; /* (tensors of the file) */
} ds_file_source;

ds_status ds_file_source_open(const ds_gguf *gguf, ds_file_source *out, ds_error *err);
void ds_file_source_close(ds_file_source *file);
/* Its tensors by name; the file source outlives it. */
ds_source ds_file_source_view(ds_file_source *file);

/* After all weights are bound: refuse (DS_EUNSUPPORTED) a tensor of a block, or of the positions, that was not asked for;
 * note others. Blocks from config->n_layer on are a draft head's and may stay. */
ds_status ds_file_source_check(const ds_file_source *file, ds_config *config, ds_error *err);
