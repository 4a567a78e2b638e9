/* gguf.c: the life of a view: map, parse, look up, unmap. */
#include "gguf/gguf.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/os.h"
#include "gguf/internal.h"

enum { SHOWN_BYTES = 200 };

/* The end of a long path, begun at a whole UTF-8 character: the file's name is there. */
static const char *label_end(const char *label) {
    size_t n = strlen(label);
    const char *p = n > SHOWN_BYTES ? label + (n - SHOWN_BYTES) : label;
    while ((*p & 0xc0) == 0x80) {
        p++;
    }
    return p;
}

static ds_status gguf_new(const char *label, ds_gguf **out, ds_error *err) {
    ds_gguf *g = calloc(1, sizeof *g);
    char *copy = strdup(label);
    if (!g || !copy) {
        free(g);
        free(copy);
        return ds_fail(err, DS_ENOMEM, "`%s`: no memory to open it", label_end(label));
    }
    g->label = copy;
    g->shown = label_end(copy);
    *out = g;
    return DS_OK;
}

static ds_status fail_system(ds_gguf *g, ds_error *err, const char *verb) {
    int code = errno;
    DS_GGUF_FAIL(g, err, code == ENOMEM ? DS_ENOMEM : DS_EIO, "cannot %s: %s", verb, strerror(code));
    err->system = code;
    if (code == ENOENT) return ds_hint(err, "check the path, or fetch a model with dsv2 download");
    if (code == EMFILE || code == ENFILE) return ds_hint(err, "raise the limit of open files (ulimit -n)");
    return err->status;
}

static ds_status check_kind(ds_gguf *g, const ds_file_stamp *found, ds_error *err) {
    if (found->kind != DS_FILE_REGULAR) {
        const bool folder = found->kind == DS_FILE_FOLDER;
        DS_GGUF_FAIL(g, err, DS_EIO, "%s, not a file", folder ? "a directory" : "a device or pipe");
        return folder
                   ? ds_hint(err, "name the GGUF file inside it; a checkpoint folder goes through dsv2 quantize first")
                   : err->status;
    }
    if (found->size == 0) {
        DS_GGUF_FAIL(g, err, DS_EFORMAT, "the file is empty");
        return ds_hint(err, "download or convert it again");
    }
    if ((uintmax_t)found->size > SIZE_MAX) {
        return DS_GGUF_FAIL(g, err, DS_EUNSUPPORTED, "%jd bytes are more than memory can address",
                            (intmax_t)found->size);
    }
    return DS_OK;
}

/* Map the whole file read-only. It stays open: a name may come to mean another file. */
static ds_status map_file(ds_gguf *g, ds_error *err) {
    ds_file file;
    ds_status st;
    void *base = NULL;
    if (!ds_file_open(g->label, &file)) {
        return fail_system(g, err, "open");
    }
    /* Before it is mapped: a file that changes in between counts as changed. */
    if (!ds_file_stamp_get(file, &g->stamp)) {
        st = fail_system(g, err, "read its size");
    } else if ((st = check_kind(g, &g->stamp, err)) == DS_OK && !(base = ds_pages_map(file, (size_t)g->stamp.size))) {
        st = fail_system(g, err, "map");
    }
    if (st != DS_OK) {
        ds_file_close(file);
        return st;
    }
    g->base = base;
    g->size = (size_t)g->stamp.size;
    g->mapped = true;
    g->file = file;
    return DS_OK;
}

static ds_status check_one(const ds_gguf *g, ds_error *err) {
    ds_file_stamp now;
    if (!g->mapped) {
        return DS_OK;
    }
    if (!ds_file_stamp_get(g->file, &now)) {
        return DS_GGUF_FAIL(g, err, DS_EIO, "cannot read its size: %s", strerror(errno));
    }
    if (ds_file_stamp_equal(&now, &g->stamp)) {
        return DS_OK;
    }
    if (now.size != g->stamp.size) {
        DS_GGUF_FAIL(g, err, DS_EIO, "the file was %" PRId64 " bytes long when it was opened and is %" PRId64 " now",
                     g->stamp.size, now.size);
    } else {
        DS_GGUF_FAIL(g, err, DS_EIO, "the file was written to after it was opened");
    }
    return ds_hint(err,
                   "open it again once it is whole; to replace a model in use, move the new file over the old name");
}

ds_status ds_gguf_check(const ds_gguf *gguf, ds_error *err) {
    ds_status st = check_one(gguf, err);
    for (int64_t i = 1; gguf->parts && i < gguf->n_split && st == DS_OK; i++) {
        st = check_one(gguf->parts[i - 1], err);
    }
    return st;
}

/* Part i, 0 the first. */
static const ds_gguf *part_of(const ds_gguf *g, int64_t i) { return i == 0 ? g : g->parts[i - 1]; }

static int64_t n_parts(const ds_gguf *g) { return g->parts ? g->n_split : 1; }

bool ds_gguf_locate(const ds_gguf *gguf, const void *data, size_t n, ds_gguf_place *out) {
    const uintptr_t at = (uintptr_t)data;
    for (int64_t i = 0; i < n_parts(gguf); i++) {
        const ds_gguf *part = part_of(gguf, i);
        const uintptr_t base = (uintptr_t)part->base;
        if (!part->mapped || at < base || at - base > part->size || n > part->size - (at - base)) {
            continue;
        }
        *out = (ds_gguf_place){part->file, (int64_t)(at - base), (int64_t)part->size};
        return true;
    }
    return false;
}

bool ds_gguf_leave_mapping(const ds_gguf *gguf, bool direct) {
    bool all = true;
    for (int64_t i = 0; i < n_parts(gguf); i++) {
        const ds_gguf *part = part_of(gguf, i);
        if (!part->mapped) {
            return false;
        }
        ds_pages_sparse((void *)part->base, part->size);
        ds_file_sparse(part->file);
        ds_file_forget(part->file, part->size, 0);
        all = all && (!direct || ds_file_direct(part->file, true));
    }
    for (int64_t i = 0; (!all || !direct) && i < n_parts(gguf); i++) {
        ds_file_direct(part_of(gguf, i)->file, false);
    }
    return all;
}

/* Of one file. Where its first and last bytes share a huge page with something else they stay. */
static ds_status settle_one(const ds_gguf *g, size_t from, size_t n, ds_error *err) {
    const uintptr_t base = (uintptr_t)g->base, page = DS_HUGE_PAGE;
    const uintptr_t first = (base + from + page - 1) / page * page, end = (base + from + n) / page * page;
    if (first >= end || ds_pages_settle(g->file, (void *)first, end - first, (int64_t)(first - base))) {
        return DS_OK;
    }
    const int code = errno;
    if (check_one(g, err) != DS_OK) {
        return err->status;
    }
    const ds_status st = code == ENOMEM ? DS_ENOMEM : code == ENOSYS ? DS_EUNSUPPORTED : DS_EIO;
    return DS_GGUF_FAIL(g, err, st, "cannot move it to huge pages of memory: %s", strerror(code));
}

ds_status ds_gguf_settle(const ds_gguf *gguf, size_t *from, size_t n, ds_error *err) {
    size_t begin = 0;
    for (int64_t i = 0; i < n_parts(gguf); begin += part_of(gguf, i++)->size) {
        const ds_gguf *part = part_of(gguf, i);
        const size_t at = *from - begin;
        if (at >= part->size) continue;
        const size_t left = part->size - at, end = at + (n < left ? n / DS_HUGE_PAGE * DS_HUGE_PAGE : left);
        ds_status st = part->mapped ? check_one(part, err) : DS_OK;
        if (st == DS_OK && part->mapped) st = settle_one(part, at, end - at, err);
        if (st == DS_OK) *from = begin + end;
        return st;
    }
    *from = begin;
    return DS_OK;
}

ds_status ds_gguf_open_one(const char *path, ds_gguf **out, ds_error *err) {
    ds_gguf *g = NULL;
    ds_status st = gguf_new(path, &g, err);
    if (st != DS_OK) {
        return st;
    }
    if ((st = map_file(g, err)) != DS_OK || (st = ds_gguf_parse(g, err)) != DS_OK) {
        ds_gguf_close(g);
        return st;
    }
    *out = g;
    return DS_OK;
}

ds_status ds_gguf_open(const char *path, ds_gguf **out, ds_error *err) {
    ds_gguf *g = NULL;
    ds_status st = ds_gguf_open_one(path, &g, err);
    if (st != DS_OK) {
        return st;
    }
    if (g->n_split > 1 && (st = ds_gguf_join(g, err)) != DS_OK) {
        ds_gguf_close(g);
        return st;
    }
    *out = g;
    return DS_OK;
}

ds_status ds_gguf_view(const void *data, size_t size, const char *label, ds_gguf **out, ds_error *err) {
    ds_gguf *g = NULL;
    ds_status st = gguf_new(label, &g, err);
    if (st != DS_OK) {
        return st;
    }
    g->base = data;
    g->size = size;
    if ((st = ds_gguf_parse(g, err)) == DS_OK && g->n_split > 1) {
        st = DS_GGUF_FAIL(g, err, DS_EUNSUPPORTED,
                          "a part of a split model, in memory: its other parts cannot be found");
    }
    if (st != DS_OK) {
        ds_gguf_close(g);
        return st;
    }
    *out = g;
    return DS_OK;
}

void ds_gguf_close(ds_gguf *gguf) {
    if (!gguf) {
        return;
    }
    for (int64_t i = 1; gguf->parts && i < gguf->n_split; i++) {
        ds_gguf_close(gguf->parts[i - 1]);
    }
    free(gguf->parts);
    if (gguf->mapped) {
        ds_pages_release((void *)gguf->base, gguf->size);
        ds_file_close(gguf->file);
    }
    free(gguf->kv);
    free(gguf->kv_names);
    free(gguf->tensors);
    free(gguf->tensor_names);
    free(gguf->tensor_text);
    free(gguf->label);
    free(gguf);
}

const char *ds_gguf_label(const ds_gguf *gguf) { return gguf->label; }

size_t ds_gguf_size(const ds_gguf *gguf) {
    size_t size = gguf->size;
    for (int64_t i = 1; gguf->parts && i < gguf->n_split; i++) {
        size += gguf->parts[i - 1]->size;
    }
    return size;
}

size_t ds_gguf_n_kv(const ds_gguf *gguf) { return gguf->n_kv; }

const ds_gguf_kv *ds_gguf_kv_at(const ds_gguf *gguf, size_t i) { return &gguf->kv[i]; }

const ds_gguf_kv *ds_gguf_kv_find(const ds_gguf *gguf, const char *key) {
    const ds_gguf_name *hit = ds_gguf_name_find(gguf->kv_names, gguf->n_kv, (ds_str){key, strlen(key)});
    return hit ? &gguf->kv[hit->index] : NULL;
}

size_t ds_gguf_n_tensors(const ds_gguf *gguf) { return gguf->n_tensors; }

const ds_tensor *ds_gguf_tensor_at(const ds_gguf *gguf, size_t i) { return &gguf->tensors[i]; }

const ds_tensor *ds_gguf_tensor_find(const ds_gguf *gguf, const char *name) {
    const ds_gguf_name *hit = ds_gguf_name_find(gguf->tensor_names, gguf->n_tensors, (ds_str){name, strlen(name)});
    return hit ? &gguf->tensors[hit->index] : NULL;
}
