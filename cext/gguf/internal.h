/* internal.h: what the files of this room share. Nothing outside cext/gguf includes it. */
#pragma once

#include "base/os.h"
#include "gguf/gguf.h"

/* A name and where its entry stands. Sorted by name: a lookup is a binary search, which no choice of names can make
 * slow, and equal names are neighbours. */
typedef struct ds_gguf_name {
    ds_str name;
    size_t index;
} ds_gguf_name;

struct ds_gguf {
    char *label;
    const char *shown; /* the end of label, short enough that a message keeps room for the fault */
    const uint8_t *base;
    size_t size;
    bool mapped;
    ds_file file; /* of a mapped file, open to see whether it changes */
    ds_file_stamp stamp; /* of the file when it was mapped */

    ds_gguf_kv *kv; /* (n_kv), in the file's order */
    ds_gguf_name *kv_names;
    size_t n_kv;

    ds_tensor *tensors; /* (n_tensors), in the file's order */
    ds_gguf_name *tensor_names;
    char *tensor_text; /* (n_tensors, DS_GGUF_MAX_NAME + 1): the names that the tensors point at */
    size_t n_tensors;

    int64_t split, n_split;  /* which part of how many this file is: 0 of 1 where the model is not split */
    struct ds_gguf **parts; /* (n_split - 1) the others, owned; NULL where there are none */
};

enum {
    DS_GGUF_MAX_NAME = 64,         /* bytes of a tensor's name, by the format's definition */
    DS_GGUF_MAX_KEY = 65535,       /* bytes of a key, the same */
    DS_GGUF_MAX_ENTRIES = 1 << 20, /* keys or tensors; the largest models have some thousands */
};

/* Prefix a fault with the file that has it. */
#define DS_GGUF_FAIL(gguf, err, status, format, ...) ds_fail(err, status, "`%s`: " format, (gguf)->shown, ##__VA_ARGS__)

/* Map and parse the one file at path. */
ds_status ds_gguf_open_one(const char *path, ds_gguf **out, ds_error *err);
/* Open the other parts of a split model whose first part is g, and put their tensors behind its own. */
ds_status ds_gguf_join(ds_gguf *g, ds_error *err);

/* Fill the directory (kv, tensors and their names) from base and size. On failure what was allocated stays in *gguf. */
ds_status ds_gguf_parse(ds_gguf *gguf, ds_error *err);

/* Bytes of a scalar of `type`; 0 for a string, an array, or a type that the format does not have. */
size_t ds_gguf_type_bytes(uint32_t type);
const char *ds_gguf_type_name(uint32_t type);

/* The entry called `name`, or NULL. */
const ds_gguf_name *ds_gguf_name_find(const ds_gguf_name *names, size_t n, ds_str name);
/* Sort; returns an entry whose name occurs twice, or NULL. */
const ds_gguf_name *ds_gguf_name_sort(ds_gguf_name *names, size_t n);
