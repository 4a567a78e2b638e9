/* types.h: name and size of every tensor type that a GGUF may hold, run by this engine or not. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct ds_gguf_tensor_type {
    const char *name;        /* lower case: "iq3_s" */
    uint32_t gguf_type;      /* the id in a tensor record */
    uint32_t block_elements; /* values in a block; a row is a whole number of blocks */
    uint32_t block_bytes;
} ds_gguf_tensor_type;

/* Look a type id up; false, and *out untouched, where nothing is known of it. */
bool ds_gguf_tensor_type_get(uint32_t gguf_type, ds_gguf_tensor_type *out);
