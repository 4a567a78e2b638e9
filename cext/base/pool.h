/* pool.h: a team of threads that run one function together (single program, all threads), with barriers between phases.
 * The calling thread is worker 0. Idle workers sleep in the kernel; a barrier spins briefly and then sleeps, because a
 * worker that only spins costs 10x on a shared machine when its peer is descheduled. */
#pragma once

#include <stdatomic.h>
#include <stddef.h>

#include "base/status.h"

typedef struct ds_pool ds_pool;

typedef struct ds_worker {
    ds_pool *pool;
    int ith, nth; /* this worker's number and the team's size */
} ds_worker;

/* Start n_threads - 1 threads (1 <= n_threads <= 512). *out is set on success only; destroy joins them. */
ds_status ds_pool_create(int n_threads, ds_pool **out, ds_error *err);
void ds_pool_destroy(ds_pool *pool);
int ds_pool_size(const ds_pool *pool);
/* Run fn(worker, arg) on every worker and return when all have returned. Callers from several threads take turns; fn
 * itself must not call it. A forked child has the pool but not its threads: it must not run it, and may destroy it. */
void ds_pool_run(ds_pool *pool, void (*fn)(const ds_worker *worker, void *arg), void *arg);

/* Wait until every worker of this run has arrived. All memory written before is visible after. */
void ds_barrier(const ds_worker *worker);

/* Claim the next of the numbers 0, 1, 2, ... in the current phase (between two barriers); each is given to one worker. */
size_t ds_claim(const ds_worker *worker);
