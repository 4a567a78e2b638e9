/* pool_stress.c: runs, barriers and claims under contention. Built with ThreadSanitizer, and once more with
 * -DDS_POOL_CONDVAR for the sleep that other systems use:
 *
 *     cc -std=gnu11 -O1 -g -fsanitize=thread -Icext cext/base/{pool,status,os_posix,os_linux}.c tests/stress/pool_stress.c -pthread
 *
 * Prints one line, and returns 1 where a sum is wrong. */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>

#include "base/pool.h"

enum { N = 512, N_CALLERS = 3 };

/* Plain memory, so that a barrier that does not order it is a race that the sanitizer sees. */
typedef struct job {
    int n_rounds;
    long a[N], b[N], sum;
    int n_claimed[N];
} job;

static void work(const ds_worker *worker, void *arg) {
    job *j = arg;
    for (int round = 0; round < j->n_rounds; round++) {
        for (size_t i; (i = ds_claim(worker)) < N;) {
            j->a[i] = (long)i + round;
            j->n_claimed[i]++;
        }
        ds_barrier(worker);
        for (int i = worker->ith; i < N; i += worker->nth) {
            j->b[i] = j->a[N - 1 - i];
        }
        ds_barrier(worker);
        for (int i = 0; worker->ith == 0 && i < N; i++) {
            j->sum += j->b[i];
        }
        if (round + 1 < j->n_rounds) {
            ds_barrier(worker);
        }
    }
}

static bool run_many(ds_pool *pool, int n_runs, int n_rounds) {
    const long expected = (long)N * (N - 1) / 2 * n_rounds + (long)N * n_rounds * (n_rounds - 1) / 2;
    bool good = true;
    for (int run = 0; run < n_runs; run++) {
        job j = {.n_rounds = n_rounds};
        ds_pool_run(pool, work, &j);
        good &= j.sum == expected;
        for (int i = 0; i < N; i++) {
            good &= j.n_claimed[i] == n_rounds;
        }
    }
    return good;
}

static void *call(void *pool) { return run_many(pool, 100, 3) ? pool : NULL; }

/* Several threads that share one pool take turns. */
static bool run_from_callers(ds_pool *pool) {
    pthread_t callers[N_CALLERS];
    bool good = true;
    for (int i = 0; i < N_CALLERS; i++) {
        good &= pthread_create(&callers[i], NULL, call, pool) == 0;
    }
    for (int i = 0; i < N_CALLERS && good; i++) {
        void *result;
        pthread_join(callers[i], &result);
        good &= result != NULL;
    }
    return good;
}

int main(void) {
    static const int SIZES[] = {1, 2, 3, 8, 17};
    ds_error err;
    ds_pool *pool;
    bool good = ds_pool_create(0, &pool, &err) == DS_EINVAL && ds_pool_create(513, &pool, &err) == DS_EINVAL;
    for (size_t i = 0; i < sizeof SIZES / sizeof *SIZES && good; i++) {
        good = ds_pool_create(SIZES[i], &pool, &err) == DS_OK;
        if (good) {
            good = ds_pool_size(pool) == SIZES[i] && run_many(pool, 100, 7) && run_from_callers(pool);
            ds_pool_destroy(pool);
        }
    }
    for (int i = 0; i < 50 && good; i++) { /* threads that never get to run */
        good = ds_pool_create(4, &pool, &err) == DS_OK;
        if (good) {
            ds_pool_destroy(pool);
        }
    }
    puts(good ? "pool_stress: every sum is right" : "pool_stress: WRONG");
    return good ? 0 : 1;
}
