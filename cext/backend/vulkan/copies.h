/* copies.h: memory of the host's copied to a device while it computes: threads of their own fill a ring of memory that the
 * device reads, pieces of which are copied on the queue for copies, in the order in which they are asked for. Knows no
 * model. But for its threads one thread uses it. */
#pragma once

#include "backend/vulkan/gpu.h"

enum {
    DS_COPY_PARTS = 3,
    DS_COPY_PIECE = 4 << 20, /* bytes of a piece at most; larger pieces gain nothing, below 2 MiB the link is slower */
    DS_COPY_AHEAD = 4, /* places of the ring beside one a thread: what the device copies while threads fill */
    DS_COPY_THREADS = 16, /* at most */
};

typedef struct ds_copies ds_copies;

/* What is copied as a whole: parts of the host's memory, behind each other with gaps. Its memory is the caller's, and stays
 * as it is until ds_copies_settle. */
typedef struct ds_copy {
    const void *from[DS_COPY_PARTS];
    uint64_t at[DS_COPY_PARTS], part_bytes[DS_COPY_PARTS]; /* where a part begins behind to_at, in rising order */
    const ds_gpu_buffer *to;
    uint64_t to_at, bytes; /* of all with the gaps */
    uint64_t gate; /* 0, or the number of a list that reads what lay there before: it is copied behind that */
    /* Of copies.c: */
    uint64_t begun; /* bytes that a thread has taken on: what is begun is brought to its end */
    uint64_t left; /* bytes that are not submitted yet; 0, with all begun: it is there once the semaphore says so */
    uint64_t value; /* of the semaphore */
    uint64_t awaited; /* the number of the list that it is the last or one of several to be submitted for; 0: none */
    bool ordered; /* and not dropped: it will be there */
} ds_copy;

/* piece: bytes of one at most. On success *out is to be destroyed before the GPU is closed. */
ds_status ds_copies_create(ds_gpu *gpu, int n_threads, uint64_t piece, ds_copies **out, ds_error *err);
void ds_copies_destroy(ds_copies *copies);
/* Bytes of the host's memory that its ring takes. */
uint64_t ds_copies_ring_bytes(const ds_copies *copies);

/* Drop what is ordered and not begun. begun (n): which of these are, or are there; the bytes of all that are begun and not
 * submitted yet. */
uint64_t ds_copies_drop(ds_copies *copies, ds_copy *const *some, int n, bool *begun);
/* Copy these, in this order, behind what was ordered before. */
void ds_copies_order(ds_copies *copies, ds_copy *const *order, int n);
/* Submit a list of commands, behind those before, once all these copies are submitted, to run behind them: now, or by the
 * thread that submits the last of them. more: another follows before any is waited for. Returns its number, 1 and up. */
uint64_t ds_copies_then(ds_copies *copies, ds_copy *const *awaited, int n, ds_gpu_script *list, bool more);
/* Until all these lists are submitted, and when the last was (ds_now_ns); or what came in its way. */
ds_status ds_copies_submitted(ds_copies *copies, int64_t *when, ds_error *err);
/* Until the list of that number has run. */
ds_status ds_copies_reached(ds_copies *copies, uint64_t number, ds_error *err);
/* Until what is begun of these, or ordered, is there or has failed. */
void ds_copies_settle(ds_copies *copies, ds_copy *const *all, int n);
/* Forget what is ordered, and a failure; what was begun is settled. */
void ds_copies_reset(ds_copies *copies);
/* Bytes that were copied so far, and how long something was being copied. */
void ds_copies_told(ds_copies *copies, uint64_t *bytes, uint64_t *ns);
