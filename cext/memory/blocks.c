#include "memory/blocks.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/os.h"

enum {
    HEADER = 64,            /* bytes before a block's own: what follows is aligned as rows want to be */
    SLAB_BYTES = 64 << 20,  /* of address space: what is not touched costs nothing */
    HUGE_WASTE = 8,         /* up to this part of a block is given up for huge pages of its own */
};

/* Blocks mapped together, and which of them are free. */
typedef struct ds_slab {
    struct ds_slab *next;
    unsigned char *mapping, *first;
    size_t bytes; /* of the mapping */
    int n_free;
    int free[]; /* (n_slab), of which n_free are set: the last is taken next */
} ds_slab;

typedef struct header {
    ds_slab *slab;
    int holders;
    uint64_t serial;
} header;

static header *header_of(const unsigned char *block) { return (header *)(void *)(block - HEADER); }

static uint64_t next_serial(void) {
    static _Atomic uint64_t last;
    return atomic_fetch_add(&last, 1) + 1;
}

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void ds_blocks_create(size_t n_bytes, ds_blocks *out) {
    const size_t all = n_bytes + HEADER, huge = round_up(all, DS_HUGE_PAGE);
    *out = (ds_blocks){.stride = huge - all <= all / HUGE_WASTE ? huge : round_up(all, ds_pages_size())};
    out->n_slab = out->stride < SLAB_BYTES ? (int)(SLAB_BYTES / out->stride) : 1;
    ds_lock_init(&out->lock);
    out->process = ds_process_id();
}

static ds_slab *slab_new(const ds_blocks *b) {
    const size_t bytes = b->stride * (size_t)b->n_slab;
    ds_slab *slab = malloc(sizeof *slab + (size_t)b->n_slab * sizeof *slab->free);
    if (!slab) return NULL;
    *slab = (ds_slab){.bytes = bytes + DS_HUGE_PAGE, .n_free = b->n_slab};
    /* Huge pages where a block is about as large: a smaller one would take a whole one for its first row. */
    slab->mapping = b->stride >= DS_HUGE_PAGE / 2 ? ds_pages_new(slab->bytes) : ds_pages_new_small(slab->bytes);
    if (!slab->mapping) {
        free(slab);
        return NULL;
    }
    slab->first = slab->mapping + (DS_HUGE_PAGE - (uintptr_t)slab->mapping % DS_HUGE_PAGE) % DS_HUGE_PAGE;
    for (int i = 0; i < b->n_slab; i++) slab->free[i] = b->n_slab - 1 - i;
    return slab;
}

static void slab_release(ds_slab *slab) {
    ds_pages_release(slab->mapping, slab->bytes);
    free(slab);
}

void ds_blocks_release(ds_blocks *blocks) {
    for (ds_slab *slab = blocks->slabs, *next; slab; slab = next) {
        next = slab->next;
        slab_release(slab);
    }
    ds_lock_free(&blocks->lock);
    *blocks = (ds_blocks){0};
}

/* The first slab with a free block, made where there is none; NULL without memory. */
static ds_slab *slab_with_room(ds_blocks *b) {
    ds_slab **at = &b->slabs;
    while (*at && !(*at)->n_free) at = &(*at)->next;
    if (!*at) *at = slab_new(b);
    return *at;
}

unsigned char *ds_blocks_take(ds_blocks *blocks) {
    unsigned char *block = NULL;
    ds_lock_take(&blocks->lock);
    ds_slab *slab = slab_with_room(blocks);
    if (slab) {
        block = slab->first + (size_t)slab->free[--slab->n_free] * blocks->stride + HEADER;
        *header_of(block) = (header){slab, 1, next_serial()};
        blocks->n_used++;
    }
    ds_lock_give(&blocks->lock);
    return block;
}

void ds_blocks_share(ds_blocks *blocks, unsigned char *block) {
    ds_lock_take(&blocks->lock);
    blocks->n_shared += ++header_of(block)->holders == 2;
    ds_lock_give(&blocks->lock);
}

/* Put a block without holders back into its slab, and the slab back where it was the last. */
static void put_back(ds_blocks *b, unsigned char *block) {
    ds_slab *slab = header_of(block)->slab, **at = &b->slabs;
    unsigned char *start = block - HEADER;
    b->n_used--;
    slab->free[slab->n_free++] = (int)((size_t)(start - slab->first) / b->stride);
    if (slab->n_free < b->n_slab) {
        ds_pages_forget(start, b->stride);
        return;
    }
    while (*at != slab) at = &(*at)->next;
    *at = slab->next;
    slab_release(slab);
}

void ds_blocks_drop(ds_blocks *blocks, unsigned char *block) {
    if (blocks->process != ds_process_id()) return;
    ds_lock_take(&blocks->lock);
    const int left = --header_of(block)->holders;
    blocks->n_shared -= left == 1;
    if (!left) put_back(blocks, block);
    ds_lock_give(&blocks->lock);
}

bool ds_blocks_sole(ds_blocks *blocks, const unsigned char *block) {
    ds_lock_take(&blocks->lock);
    const bool sole = header_of(block)->holders == 1;
    ds_lock_give(&blocks->lock);
    return sole;
}

uint64_t ds_blocks_serial(const unsigned char *block) { return header_of(block)->serial; }

void ds_blocks_renew(unsigned char *block) { header_of(block)->serial = next_serial(); }

ds_blocks_usage ds_blocks_count(ds_blocks *blocks) {
    const bool shared = blocks->process == ds_process_id(); /* a forked child is alone with its copy */
    if (shared) ds_lock_take(&blocks->lock);
    const ds_blocks_usage usage = {blocks->n_used, blocks->n_shared, blocks->n_used * blocks->stride};
    if (shared) ds_lock_give(&blocks->lock);
    return usage;
}
