/* blocks.h: memory in blocks of one size, each held by one sequence or by several that share a past. Owns the memory and
 * counts the holders; knows no rows. All but create and release may be called from several threads at once.
 *
 * In a forked child another thread may have held the lock at the fork, for ever: there a drop keeps the block until release,
 * a count tells what it finds, and take, share and sole must not be called. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "base/os.h"
#include "base/status.h"

typedef struct ds_blocks {
    size_t stride; /* bytes from a block to the next: whole pages, header included */
    int n_slab; /* blocks that are mapped together */
    struct ds_slab *slabs; /* the oldest first: the younger ones empty themselves, and go back to the system */
    size_t n_used, n_shared; /* blocks held, and those of them held by more than one */
    ds_lock lock;
    int64_t process; /* that made it */
} ds_blocks;

typedef struct ds_blocks_usage {
    size_t n_used, n_shared, bytes;
} ds_blocks_usage;

/* A pool of blocks of n_bytes; takes no memory before the first block. Where a block fills most of some huge pages it gets
 * them to itself. */
void ds_blocks_create(size_t n_bytes, ds_blocks *out);
/* Every block is dropped before. */
void ds_blocks_release(ds_blocks *blocks);

/* A block with one holder, at a multiple of 64, its bytes unspecified; NULL where there is no memory. */
unsigned char *ds_blocks_take(ds_blocks *blocks);
/* One holder more; a block that several hold is read only. */
void ds_blocks_share(ds_blocks *blocks, unsigned char *block);
/* One holder less; the last one's memory goes back to the system. */
void ds_blocks_drop(ds_blocks *blocks, unsigned char *block);
/* Whether the caller is its only holder: what others wrote before they dropped it is then visible, and it may write. */
bool ds_blocks_sole(ds_blocks *blocks, const unsigned char *block);

/* Which block this is: no other had or will have that number, whatever memory it is in. Who copied a block elsewhere knows
 * by it whether the copy is of this one. */
uint64_t ds_blocks_serial(const unsigned char *block);
/* It is another block from here on: its only holder changes what a copy may hold. */
void ds_blocks_renew(unsigned char *block);

ds_blocks_usage ds_blocks_count(ds_blocks *blocks);
