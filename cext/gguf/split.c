/* split.c: a model in several files, NAME-00001-of-0000N.gguf, as gguf-split writes it: the first holds the metadata,
 * each its own tensors. One view over them all: the others are parsed like any file and belong to the first. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf/internal.h"

enum { MOST_PARTS = 99999 /* what five digits number */ };
enum { SUFFIX_BYTES = sizeof "-00001-of-00001.gguf" - 1 };

static const char HINT_ALL[] =
    "all parts must lie in one folder under the names that they were made with: download them again";

/* Whether a path ends as part `part` of n does. */
static bool ends_as_part(const char *path, int64_t part, int64_t n) {
    char suffix[64];
    const size_t size = strlen(path);
    snprintf(suffix, sizeof suffix, "-%05" PRId64 "-of-%05" PRId64 ".gguf", part + 1, n);
    return size >= SUFFIX_BYTES && strcmp(path + size - SUFFIX_BYTES, suffix) == 0;
}

/* A copy of the first part's path, with another part's number in it; to be freed. */
static char *part_path(const ds_gguf *first, int64_t part) {
    char *path = strdup(first->label);
    if (path) {
        char *digit = path + strlen(path) - SUFFIX_BYTES + sizeof "-00001" - 1;
        for (int64_t number = part + 1, i = 0; i < 5; i++, number /= 10) {
            *--digit = (char)('0' + number % 10);
        }
    }
    return path;
}

static ds_status check_first(const ds_gguf *g, ds_error *err) {
    if (g->n_split > MOST_PARTS) {
        DS_GGUF_FAIL(g, err, DS_EFORMAT, "key `split.count` is %" PRId64 ", expected at most %d", g->n_split,
                     MOST_PARTS);
        return ds_hint(err, "the file is damaged: download it again");
    }
    if (g->split != 0) {
        DS_GGUF_FAIL(g, err, DS_EUNSUPPORTED, "part %" PRId64 " of %" PRId64 " of a split model", g->split + 1,
                     g->n_split);
        return ds_hint(
            err, "open the first part, whose name has 00001 in place of this one's number: it brings in the others");
    }
    if (!ends_as_part(g->label, 0, g->n_split)) {
        DS_GGUF_FAIL(g, err, DS_EUNSUPPORTED,
                     "the first of %" PRId64
                     " parts of a split model, but its name does not end in -00001-of-%05d.gguf",
                     g->n_split, (int)g->n_split);
        return ds_hint(err, HINT_ALL);
    }
    return DS_OK;
}

static ds_status open_part(ds_gguf *g, int64_t i, ds_error *err) {
    char *path = part_path(g, i);
    if (!path) {
        return DS_GGUF_FAIL(g, err, DS_ENOMEM, "no memory for %" PRId64 " parts", g->n_split);
    }
    ds_status st = ds_gguf_open_one(path, &g->parts[i - 1], err);
    free(path);
    if (st != DS_OK) {
        const bool missing = err->system == 0 || err->system == ENOENT; /* nothing of that name, or no file */
        return st == DS_EIO && missing ? ds_hint(err, HINT_ALL) : st;
    }
    const ds_gguf *part = g->parts[i - 1];
    if (part->n_split != g->n_split || part->split != i) {
        DS_GGUF_FAIL(part, err, DS_EFORMAT,
                     "says that it is part %" PRId64 " of %" PRId64 ", expected %" PRId64 " of %" PRId64,
                     part->split + 1, part->n_split, i + 1, g->n_split);
        return ds_hint(err, HINT_ALL);
    }
    return DS_OK;
}

/* The tensors of all parts under the first, in the parts' order. */
static ds_status join_tensors(ds_gguf *g, ds_error *err) {
    size_t n = g->n_tensors;
    for (int64_t i = 1; i < g->n_split; i++) {
        n += g->parts[i - 1]->n_tensors;
    }
    bool bad = false;
    int64_t expected = (int64_t)n;
    ds_gguf_get_i64(g, "split.tensors.count", &expected, &bad, err);
    if (bad) {
        return err->status;
    }
    if (expected != (int64_t)n) {
        DS_GGUF_FAIL(g, err, DS_EFORMAT, "its %" PRId64 " parts hold %zu tensors, expected %" PRId64, g->n_split, n,
                     expected);
        return ds_hint(err, HINT_ALL);
    }
    ds_tensor *tensors = calloc(n + 1, sizeof *tensors);
    ds_gguf_name *names = calloc(n + 1, sizeof *names);
    if (!tensors || !names) {
        free(tensors);
        free(names);
        return DS_GGUF_FAIL(g, err, DS_ENOMEM, "no memory for %zu tensors", n);
    }
    size_t at = 0;
    for (int64_t i = 0; i < g->n_split; i++) {
        const ds_gguf *part = i == 0 ? g : g->parts[i - 1];
        for (size_t j = 0; j < part->n_tensors; j++, at++) {
            tensors[at] = part->tensors[j];
            tensors[at].part = (int)i;
            names[at] = (ds_gguf_name){{tensors[at].name, strlen(tensors[at].name)}, at};
        }
    }
    free(g->tensors);
    free(g->tensor_names);
    g->tensors = tensors;
    g->tensor_names = names;
    g->n_tensors = n;
    const ds_gguf_name *twice = ds_gguf_name_sort(names, n);
    if (twice) {
        DS_GGUF_FAIL(g, err, DS_EFORMAT, "tensor `%s` stands in two parts", tensors[twice->index].name);
        return ds_hint(err, HINT_ALL);
    }
    return DS_OK;
}

ds_status ds_gguf_join(ds_gguf *g, ds_error *err) {
    ds_status st = check_first(g, err);
    if (st != DS_OK) {
        return st;
    }
    g->parts = calloc((size_t)g->n_split - 1, sizeof *g->parts);
    if (!g->parts) {
        return DS_GGUF_FAIL(g, err, DS_ENOMEM, "no memory for %" PRId64 " parts", g->n_split);
    }
    for (int64_t i = 1; i < g->n_split && st == DS_OK; i++) {
        st = open_part(g, i, err);
    }
    return st == DS_OK ? join_tensors(g, err) : st;
}
