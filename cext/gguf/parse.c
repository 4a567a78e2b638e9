/* parse.c: from bytes to a directory of keys and tensors.
 * Every number of the file is proved before it is used: a length is compared with the bytes that are left, never added
 * to a position first, and a product is divided out before it is formed. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf/internal.h"
#include "gguf/types.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the reader takes GGUF's little-endian numbers as they are"
#endif

/* The smallest record of each kind: a key of one byte with a one-byte value, a one-dimensional tensor. */
enum { MIN_KV_BYTES = 8 + 1 + 4 + 1, MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8 };
enum { DEFAULT_ALIGNMENT = 32, MIN_ALIGNMENT = 8, MAX_ALIGNMENT = 1 << 16 };

static const char HINT_AGAIN[] = "the file is incomplete or damaged: download or convert it again";
static const char HINT_DAMAGED[] =
    "the file is damaged, or was written by a faulty converter: make or download it again";

typedef struct cursor {
    ds_gguf *gguf;
    ds_error *err;
    size_t pos;       /* <= gguf->size */
    size_t alignment; /* of the data section and of each tensor in it */
    char where[160];  /* what is being read, for errors */
} cursor;

#define FAIL(c, format, ...) DS_GGUF_FAIL((c)->gguf, (c)->err, DS_EFORMAT, format, ##__VA_ARGS__)

static size_t bytes_left(const cursor *c) { return c->gguf->size - c->pos; }

/* Name in errors what comes next. A name from the file is cut, so that the fault itself stays in the message. */
static void set_where(cursor *c, const char *noun, ds_str name) {
    int shown = name.size > 80 ? 80 : (int)name.size;
    snprintf(c->where, sizeof c->where, "%s `%.*s%s`", noun, shown, name.data, name.size > 80 ? "..." : "");
}

/* Step over n bytes and lend them; NULL, with the error filled, where the file ends before. */
static const uint8_t *take(cursor *c, uint64_t n, const char *what) {
    if (n > bytes_left(c)) {
        FAIL(c, "%s: %s needs %" PRIu64 " bytes at offset %zu, but the file ends at %zu", c->where, what, n, c->pos,
             c->gguf->size);
        ds_hint(c->err, HINT_AGAIN);
        return NULL;
    }
    const uint8_t *bytes = c->gguf->base + c->pos;
    c->pos += (size_t)n;
    return bytes;
}

static ds_status take_u32(cursor *c, const char *what, uint32_t *out) {
    const uint8_t *p = take(c, sizeof *out, what);
    if (!p) {
        return DS_EFORMAT;
    }
    memcpy(out, p, sizeof *out);
    return DS_OK;
}

static ds_status take_u64(cursor *c, const char *what, uint64_t *out) {
    const uint8_t *p = take(c, sizeof *out, what);
    if (!p) {
        return DS_EFORMAT;
    }
    memcpy(out, p, sizeof *out);
    return DS_OK;
}

static ds_status take_str(cursor *c, const char *what, ds_str *out) {
    uint64_t n;
    const uint8_t *p;
    if (take_u64(c, what, &n) != DS_OK || !(p = take(c, n, what))) {
        return DS_EFORMAT;
    }
    *out = (ds_str){(const char *)p, (size_t)n};
    return DS_OK;
}

/* A key or tensor name: not empty, not endless, and free of control bytes, which would garble a terminal and, where it
 * is NUL, cut the name short. */
static ds_status take_name(cursor *c, const char *what, size_t max_bytes, ds_str *out) {
    ds_str name;
    ds_status st = take_str(c, what, &name);
    if (st != DS_OK) {
        return st;
    }
    if (name.size == 0 || name.size > max_bytes) {
        FAIL(c, "%s: %s has %zu bytes, expected 1 to %zu", c->where, what, name.size, max_bytes);
        return ds_hint(c->err, HINT_DAMAGED);
    }
    for (size_t i = 0; i < name.size; i++) {
        unsigned char byte = (unsigned char)name.data[i];
        if (byte < 0x20 || byte == 0x7f) {
            FAIL(c, "%s: %s has the control byte 0x%02x at %zu", c->where, what, byte, i);
            return ds_hint(c->err, HINT_DAMAGED);
        }
    }
    *out = name;
    return DS_OK;
}

static int compare_str(ds_str a, ds_str b) {
    int order = memcmp(a.data, b.data, a.size < b.size ? a.size : b.size);
    return order != 0 ? order : (a.size > b.size) - (a.size < b.size);
}

static int compare_names(const void *a, const void *b) {
    return compare_str(((const ds_gguf_name *)a)->name, ((const ds_gguf_name *)b)->name);
}

const ds_gguf_name *ds_gguf_name_sort(ds_gguf_name *names, size_t n) {
    if (n > 0) {
        qsort(names, n, sizeof *names, compare_names);
    }
    for (size_t i = 1; i < n; i++) {
        if (compare_str(names[i - 1].name, names[i].name) == 0) {
            return &names[i];
        }
    }
    return NULL;
}

const ds_gguf_name *ds_gguf_name_find(const ds_gguf_name *names, size_t n, ds_str name) {
    ds_gguf_name wanted = {name, 0};
    return n == 0 ? NULL : bsearch(&wanted, names, n, sizeof *names, compare_names);
}

/* Beginnings of files that people take for a GGUF, and what to do about them. */
static ds_status fail_magic(cursor *c, const uint8_t magic[4]) {
    static const struct {
        const char *bytes, *hint;
    } KNOWN[] = {
        {"lmgg", "this is a GGML file from before GGUF: convert the original checkpoint again"},
        {"tjgg", "this is a GGJT file from before GGUF: convert the original checkpoint again"},
        {"vers", "this looks like a Git LFS pointer, not the file itself: fetch it with dsv2 download"},
        {"<!do", "this looks like a web page, not the file itself: fetch it with dsv2 download"},
        {"<!DO", "this looks like a web page, not the file itself: fetch it with dsv2 download"},
        {"<htm", "this looks like a web page, not the file itself: fetch it with dsv2 download"},
        {"PK\3\4", "this is a zip archive (a PyTorch checkpoint?): a GGUF file is needed"},
    };
    const char *hint = "a GGUF file is needed: dsv2 quantize makes one from a safetensors checkpoint";
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        if (memcmp(magic, KNOWN[i].bytes, 4) == 0) {
            hint = KNOWN[i].hint;
        }
    }
    FAIL(c, "not a GGUF file: it begins with bytes %02x %02x %02x %02x, expected 47 47 55 46 (\"GGUF\")", magic[0],
         magic[1], magic[2], magic[3]);
    return ds_hint(c->err, hint);
}

static ds_status take_count(cursor *c, const char *what, size_t min_record_bytes, size_t *out) {
    uint64_t n;
    ds_status st = take_u64(c, what, &n);
    if (st != DS_OK) {
        return st;
    }
    if (n > DS_GGUF_MAX_ENTRIES || n > bytes_left(c) / min_record_bytes) {
        FAIL(c, "%s is %" PRIu64 ", more than the %zu bytes left can hold or over the limit of %d", what, n,
             bytes_left(c), DS_GGUF_MAX_ENTRIES);
        return ds_hint(c->err, HINT_AGAIN);
    }
    *out = (size_t)n;
    return DS_OK;
}

static ds_status parse_header(cursor *c) {
    uint32_t version;
    ds_status st;
    snprintf(c->where, sizeof c->where, "header");
    const uint8_t *magic = take(c, 4, "magic");
    if (!magic) {
        return DS_EFORMAT;
    }
    if (memcmp(magic, "GGUF", 4) != 0) {
        return fail_magic(c, magic);
    }
    if ((st = take_u32(c, "version", &version)) != DS_OK) {
        return st;
    }
    if (version != 0 && (version & 0xffff) == 0) {
        DS_GGUF_FAIL(c->gguf, c->err, DS_EUNSUPPORTED, "the file is big-endian (version field 0x%08" PRIx32 ")",
                     version);
        return ds_hint(c->err, "convert it to little-endian with gguf-py's gguf-convert-endian");
    }
    if (version != 2 && version != 3) {
        DS_GGUF_FAIL(c->gguf, c->err, DS_EUNSUPPORTED, "GGUF version %" PRIu32 ", this reader takes 2 and 3", version);
        return ds_hint(c->err, version < 2 ? "the file is from 2023: convert the original checkpoint again"
                                           : "the file is newer than this program or damaged: update dsv2");
    }
    if ((st = take_count(c, "the number of tensors", MIN_TENSOR_BYTES, &c->gguf->n_tensors)) != DS_OK) {
        return st;
    }
    return take_count(c, "the number of keys", MIN_KV_BYTES, &c->gguf->n_kv);
}

/* Step over n values of a type, lending their place. */
static ds_status take_values(cursor *c, uint32_t type, uint64_t n, const void **out) {
    size_t item_bytes = type == DS_GGUF_STRING ? sizeof(uint64_t) : ds_gguf_type_bytes(type);
    *out = c->gguf->base + c->pos;
    if (n > bytes_left(c) / item_bytes) {
        FAIL(c, "%s: %" PRIu64 " values of type %s do not fit in the %zu bytes left", c->where, n,
             ds_gguf_type_name(type), bytes_left(c));
        return ds_hint(c->err, HINT_AGAIN);
    }
    if (type != DS_GGUF_STRING) {
        c->pos += (size_t)n * item_bytes;
        return DS_OK;
    }
    ds_status st = DS_OK;
    for (uint64_t i = 0; i < n && st == DS_OK; i++) {
        ds_str ignored;
        st = take_str(c, "a string", &ignored);
    }
    return st;
}

static ds_status fail_value_type(cursor *c, const char *what, uint32_t type) {
    FAIL(c, "%s: %s is %" PRIu32 ", expected 0 to %d", c->where, what, type, DS_GGUF_F64);
    return ds_hint(c->err, HINT_DAMAGED);
}

static ds_status parse_kv(cursor *c, ds_gguf_kv *kv) {
    ds_status st = take_name(c, "its name", DS_GGUF_MAX_KEY, &kv->key);
    if (st != DS_OK) {
        return st;
    }
    set_where(c, "key", kv->key);
    uint32_t type, item_type;
    uint64_t n_items = 1;
    if ((st = take_u32(c, "its type", &type)) != DS_OK) {
        return st;
    }
    if (type > DS_GGUF_F64) {
        return fail_value_type(c, "its type", type);
    }
    item_type = type;
    if (type == DS_GGUF_ARRAY) {
        if ((st = take_u32(c, "its item type", &item_type)) != DS_OK ||
            (st = take_u64(c, "its length", &n_items)) != DS_OK) {
            return st;
        }
        if (item_type > DS_GGUF_F64) {
            return fail_value_type(c, "its item type", item_type);
        }
        if (item_type == DS_GGUF_ARRAY) {
            DS_GGUF_FAIL(c->gguf, c->err, DS_EUNSUPPORTED, "%s is an array of arrays", c->where);
            return ds_hint(c->err, "no model of this family has one: remove the key with gguf-py");
        }
    }
    kv->type = (ds_gguf_type)type;
    kv->item_type = (ds_gguf_type)item_type;
    kv->n_items = n_items;
    size_t begin = c->pos;
    st = take_values(c, item_type, n_items, &kv->data);
    kv->n_bytes = c->pos - begin;
    return st;
}

static ds_status fail_duplicate(cursor *c, const char *noun, ds_str name) {
    set_where(c, noun, name);
    FAIL(c, "%s stands twice", c->where);
    return ds_hint(c->err, HINT_DAMAGED);
}

static ds_status fail_memory(cursor *c, const char *what, size_t n) {
    return DS_GGUF_FAIL(c->gguf, c->err, DS_ENOMEM, "no memory for %zu %s", n, what);
}

static ds_status parse_metadata(cursor *c) {
    ds_gguf *g = c->gguf;
    /* One more than needed: calloc(0) may return NULL. */
    g->kv = calloc(g->n_kv + 1, sizeof *g->kv);
    g->kv_names = calloc(g->n_kv + 1, sizeof *g->kv_names);
    if (!g->kv || !g->kv_names) {
        return fail_memory(c, "keys", g->n_kv);
    }
    for (size_t i = 0; i < g->n_kv; i++) {
        snprintf(c->where, sizeof c->where, "key %zu of %zu", i + 1, g->n_kv);
        ds_status st = parse_kv(c, &g->kv[i]);
        if (st != DS_OK) {
            return st;
        }
        g->kv_names[i] = (ds_gguf_name){g->kv[i].key, i};
    }
    const ds_gguf_name *twice = ds_gguf_name_sort(g->kv_names, g->n_kv);
    return twice ? fail_duplicate(c, "key", twice->name) : DS_OK;
}

/* Keys that say how to read the rest of the file. */
static ds_status parse_layout(cursor *c) {
    bool bad = false;
    int64_t align = DEFAULT_ALIGNMENT, n_split = 1, split = 0;
    ds_gguf_get_i64(c->gguf, "general.alignment", &align, &bad, c->err);
    ds_gguf_get_i64(c->gguf, "split.count", &n_split, &bad, c->err);
    ds_gguf_get_i64(c->gguf, "split.no", &split, &bad, c->err);
    if (bad) {
        return c->err->status;
    }
    if (align < MIN_ALIGNMENT || align > MAX_ALIGNMENT || (align & (align - 1)) != 0) {
        FAIL(c, "key `general.alignment` is %" PRId64 ", expected a power of two from %d to %d", align, MIN_ALIGNMENT,
             MAX_ALIGNMENT);
        return ds_hint(c->err, HINT_DAMAGED);
    }
    if (n_split < 0 || split < 0 || split >= (n_split ? n_split : 1)) {
        FAIL(c, "keys `split.no` and `split.count` are %" PRId64 " and %" PRId64 ", expected a part of so many", split,
             n_split);
        return ds_hint(c->err, HINT_DAMAGED);
    }
    c->gguf->split = split;
    c->gguf->n_split = n_split ? n_split : 1;
    c->alignment = (size_t)align;
    return DS_OK;
}

static ds_status parse_shape(cursor *c, ds_tensor *t) {
    uint32_t n_dims;
    ds_status st = take_u32(c, "its number of dimensions", &n_dims);
    if (st != DS_OK) {
        return st;
    }
    if (n_dims < 1 || n_dims > 4) {
        FAIL(c, "%s has %" PRIu32 " dimensions, expected 1 to 4", c->where, n_dims);
        return ds_hint(c->err, HINT_DAMAGED);
    }
    t->n_dims = (int)n_dims;
    int64_t n_elements = 1;
    for (uint32_t d = 0; d < 4; d++) {
        uint64_t ne = 1;
        if (d < n_dims && (st = take_u64(c, "its shape", &ne)) != DS_OK) {
            return st;
        }
        if (ne == 0 || ne > (uint64_t)(INT64_MAX / n_elements)) {
            FAIL(c, "%s: dimension %" PRIu32 " is %" PRIu64 ", expected at least 1 and a product below 2^63", c->where,
                 d, ne);
            return ds_hint(c->err, HINT_DAMAGED);
        }
        t->ne[d] = (int64_t)ne;
        n_elements *= (int64_t)ne;
    }
    return DS_OK;
}

/* Bytes of a tensor whose type and shape are read. */
static ds_status size_tensor(cursor *c, ds_tensor *t) {
    ds_gguf_tensor_type type;
    t->format = ds_format_from_gguf(t->gguf_type);
    t->n_bytes = 0;
    if (!ds_gguf_tensor_type_get(t->gguf_type, &type)) {
        return DS_OK;
    }
    if (t->ne[0] % type.block_elements != 0) {
        FAIL(c, "%s: a row of %" PRId64 " values is not a whole number of %s blocks of %" PRIu32, c->where, t->ne[0],
             type.name, type.block_elements);
        return ds_hint(c->err, HINT_DAMAGED);
    }
    uint64_t n_blocks = (uint64_t)t->ne[0] * (uint64_t)t->ne[1] * (uint64_t)t->ne[2] * (uint64_t)t->ne[3];
    n_blocks /= type.block_elements;
    if (n_blocks > SIZE_MAX / type.block_bytes) {
        FAIL(c, "%s: %" PRIu64 " blocks of %" PRIu32 " bytes are more than memory can address", c->where, n_blocks,
             type.block_bytes);
        return ds_hint(c->err, HINT_DAMAGED);
    }
    t->n_bytes = (size_t)n_blocks * type.block_bytes;
    return DS_OK;
}

/* One record; t->offset is left relative to the data section, whose place is known after the last record. */
static ds_status parse_tensor(cursor *c, ds_tensor *t, char *text) {
    ds_str name;
    ds_status st = take_name(c, "its name", DS_GGUF_MAX_NAME, &name);
    if (st != DS_OK) {
        return st;
    }
    memcpy(text, name.data, name.size);
    t->name = text;
    set_where(c, "tensor", name);
    if ((st = parse_shape(c, t)) != DS_OK || (st = take_u32(c, "its type", &t->gguf_type)) != DS_OK ||
        (st = take_u64(c, "its offset", &t->offset)) != DS_OK) {
        return st;
    }
    return size_tensor(c, t);
}

static ds_status parse_tensors(cursor *c) {
    ds_gguf *g = c->gguf;
    const size_t text_bytes = DS_GGUF_MAX_NAME + 1;
    g->tensors = calloc(g->n_tensors + 1, sizeof *g->tensors);
    g->tensor_names = calloc(g->n_tensors + 1, sizeof *g->tensor_names);
    g->tensor_text = calloc(g->n_tensors + 1, text_bytes);
    if (!g->tensors || !g->tensor_names || !g->tensor_text) {
        return fail_memory(c, "tensors", g->n_tensors);
    }
    for (size_t i = 0; i < g->n_tensors; i++) {
        snprintf(c->where, sizeof c->where, "tensor %zu of %zu", i + 1, g->n_tensors);
        ds_status st = parse_tensor(c, &g->tensors[i], g->tensor_text + i * text_bytes);
        if (st != DS_OK) {
            return st;
        }
        g->tensor_names[i] = (ds_gguf_name){{g->tensors[i].name, strlen(g->tensors[i].name)}, i};
    }
    const ds_gguf_name *twice = ds_gguf_name_sort(g->tensor_names, g->n_tensors);
    return twice ? fail_duplicate(c, "tensor", twice->name) : DS_OK;
}

/* Turn offsets into places, each inside the file. */
static ds_status place_tensors(cursor *c) {
    ds_gguf *g = c->gguf;
    const size_t alignment = c->alignment;
    size_t padding = (alignment - c->pos % alignment) % alignment;
    size_t begin =
        padding <= bytes_left(c) ? c->pos + padding : g->size; /* a file without tensors may lack the padding */
    for (size_t i = 0; i < g->n_tensors; i++) {
        ds_tensor *t = &g->tensors[i];
        size_t data_bytes = g->size - begin;
        if (t->offset % alignment != 0) {
            FAIL(c, "tensor `%s`: its offset %" PRIu64 " is not a multiple of the alignment %zu", t->name, t->offset,
                 alignment);
            return ds_hint(c->err, HINT_DAMAGED);
        }
        if (t->offset > data_bytes || t->n_bytes > data_bytes - t->offset) {
            FAIL(c, "tensor `%s`: %zu bytes at %" PRIu64 " of the data section run past its end, %zu", t->name,
                 t->n_bytes, t->offset, data_bytes);
            return ds_hint(c->err, HINT_AGAIN);
        }
        t->offset += begin;
        t->data = g->base + t->offset;
    }
    return DS_OK;
}

static int compare_offsets(const void *a, const void *b) {
    const ds_tensor *x = *(const ds_tensor *const *)a, *y = *(const ds_tensor *const *)b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Two tensors on the same bytes. One of unknown size counts as a byte, so that it cannot begin inside another. */
static ds_status check_overlap(cursor *c) {
    const ds_gguf *g = c->gguf;
    ds_status st = DS_OK;
    const ds_tensor **order = calloc(g->n_tensors + 1, sizeof *order);
    if (!order) {
        return fail_memory(c, "tensors", g->n_tensors);
    }
    for (size_t i = 0; i < g->n_tensors; i++) {
        order[i] = &g->tensors[i];
    }
    qsort(order, g->n_tensors, sizeof *order, compare_offsets);
    for (size_t i = 1; i < g->n_tensors; i++) {
        const ds_tensor *a = order[i - 1], *b = order[i];
        if (b->offset - a->offset < (a->n_bytes > 0 ? a->n_bytes : 1)) {
            FAIL(c, "tensors `%s` (%zu bytes at %" PRIu64 ") and `%s` (at %" PRIu64 ") overlap", a->name, a->n_bytes,
                 a->offset, b->name, b->offset);
            st = ds_hint(c->err, HINT_DAMAGED);
            break;
        }
    }
    free(order);
    return st;
}

ds_status ds_gguf_parse(ds_gguf *gguf, ds_error *err) {
    static ds_status (*const STEPS[])(cursor *) = {
        parse_header, parse_metadata, parse_layout, parse_tensors, place_tensors, check_overlap,
    };
    cursor c = {.gguf = gguf, .err = err};
    ds_status st = DS_OK;
    for (size_t i = 0; i < sizeof STEPS / sizeof *STEPS && st == DS_OK; i++) {
        st = STEPS[i](&c);
    }
    return st;
}
