/* cache_stress.c: sessions that share a past, forked, evaluated, saved and closed by several threads at once, the model
 * closed before the last of them; and a child that was forked while a thread had the blocks' lock. Built with a sanitizer against the engine's static library; takes the path of a small
 * GGUF. Returns 1 where a fork's logits are not what they are alone, or a block is not given back. */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dsv2.h"
#include "model/session.h"

enum { N_PAST = 130, N_TAIL = 5, N_CTX = 300, N_THREADS = 4, N_ROUNDS = 12 };

static const int CUTS[] = {N_PAST, 64, 70, 1, 0};
enum { N_CUTS = sizeof CUTS / sizeof *CUTS };

typedef struct job {
    ds_model *model;
    const ds_session *origin;
    float *const *expected; /* (N_CUTS) of (n_vocab) */
    int ith;
    bool good;
} job;

/* The tail behind what the session holds: its last logits. */
static bool append(ds_model *model, ds_session *session, float *logits) {
    const int n_vocab = ds_model_config(model)->n_vocab;
    int32_t ids[N_TAIL];
    ds_error err;
    for (int i = 0; i < N_TAIL; i++) ids[i] = (i * 5 + 3) % n_vocab;
    const ds_input input = {.session = session, .ids = ids, .n = N_TAIL, .n_logits = 1};
    return ds_eval(model, &input, 1, 0, logits, NULL, &err) == DS_OK;
}

/* The session's blocks into another one, as a file would bring them. */
static ds_session *copy_of(ds_model *model, const ds_session *session, const char *kv_type) {
    unsigned char *content = malloc(ds_session_block_bytes(session));
    ds_session *copy;
    ds_error err;
    bool good = ds_session_create(model, N_CTX, kv_type, &copy, &err) == DS_OK;
    const int n = ds_session_n_past(session);
    for (int at = 0; at < n && good; at += DS_SESSION_BLOCK) {
        const int left = n - at < DS_SESSION_BLOCK ? n - at : DS_SESSION_BLOCK;
        good = ds_session_block_save(session, at / DS_SESSION_BLOCK, content, &err) == DS_OK &&
               ds_session_block_load(copy, content, left, &err) == DS_OK;
    }
    free(content);
    return good ? copy : NULL;
}

static void *work(void *arg) {
    job *j = arg;
    const size_t bytes = (size_t)ds_model_config(j->model)->n_vocab * sizeof(float);
    float *logits = malloc(bytes);
    ds_error err;
    for (int round = 0; round < N_ROUNDS && j->good; round++) {
        const int cut = (round + j->ith) % N_CUTS;
        ds_session *fork, *again, *copy;
        j->good = ds_session_fork(j->origin, CUTS[cut], &fork, &err) == DS_OK &&
                  ds_session_fork(fork, CUTS[cut], &again, &err) == DS_OK &&
                  (copy = copy_of(j->model, fork, ds_session_kv_type(fork)));
        if (!j->good) break;
        ds_session *all[] = {fork, again, copy};
        for (int i = 0; i < 3 && j->good; i++)
            j->good = append(j->model, all[i], logits) && memcmp(logits, j->expected[cut], bytes) == 0;
        ds_session_rewind(again, CUTS[cut], &err);
        j->good = j->good && append(j->model, again, logits) && memcmp(logits, j->expected[cut], bytes) == 0;
        for (int i = 0; i < 3; i++) ds_session_destroy(all[(i + round) % 3]);
    }
    free(logits);
    return NULL;
}

/* What each cut of the origin answers, alone and in one thread. */
static bool expect(ds_model *model, const ds_session *origin, float **expected) {
    bool good = true;
    for (int i = 0; i < N_CUTS && good; i++) {
        ds_session *fork;
        ds_error err;
        expected[i] = malloc((size_t)ds_model_config(model)->n_vocab * sizeof(float));
        good = ds_session_fork(origin, CUTS[i], &fork, &err) == DS_OK && append(model, fork, expected[i]);
        ds_session_destroy(fork);
    }
    return good;
}

static bool run_all(ds_model *model, const ds_session *origin) {
    float *expected[N_CUTS] = {0};
    job jobs[N_THREADS];
    pthread_t threads[N_THREADS];
    bool good = expect(model, origin, expected);
    for (int i = 0; i < N_THREADS; i++) {
        jobs[i] = (job){model, origin, expected, i, good};
        pthread_create(&threads[i], NULL, work, &jobs[i]);
    }
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(threads[i], NULL);
        good = good && jobs[i].good;
    }
    for (int i = 0; i < N_CUTS; i++) free(expected[i]);
    const ds_cache_usage usage = ds_model_cache(model);
    if (usage.n_blocks != (N_PAST + DS_SESSION_BLOCK - 1) / DS_SESSION_BLOCK || usage.n_shared) {
        printf("cache_stress: %zu blocks are left, %zu of them shared\n", usage.n_blocks, usage.n_shared);
        return false;
    }
    return good;
}

/* In a child whose copy of the blocks' lock nobody will ever give back. */
static bool is_refused(ds_model *model, ds_session *session) {
    unsigned char *content = malloc(ds_session_block_bytes(session));
    ds_session *fork;
    ds_error err;
    const size_t n_blocks = ds_model_cache(model).n_blocks;
    const bool refused =
        ds_session_block_save(session, 0, content, &err) == DS_OK &&
        ds_session_fork(session, 1, &fork, &err) == DS_EINVAL && ds_session_rewind(session, 1, &err) == DS_EINVAL &&
        ds_session_repeat(session, N_CTX, &err) == DS_EINVAL &&
        ds_session_block_load(session, content, 1, &err) == DS_EINVAL && ds_session_n_past(session) == N_PAST;
    free(content);
    ds_session_destroy(session);
    return refused && n_blocks == (N_PAST + DS_SESSION_BLOCK - 1) / DS_SESSION_BLOCK;
}

static bool check_child(ds_model *model, ds_session *session) {
    int status = 0;
    ds_lock *lock = &session->kv.store->blocks.lock;
    ds_lock_take(lock);
    const pid_t child = fork();
    if (child == 0) {
        alarm(300);
        _exit(is_refused(model, session) ? 0 : 1);
    }
    ds_lock_give(lock);
    const bool good = child > 0 && waitpid(child, &status, 0) == child && status == 0;
    if (!good) printf("cache_stress: a forked child ended with status %#x\n", (unsigned)status);
    return good;
}

static void *destroy(void *session) {
    ds_session_destroy(session);
    return NULL;
}

static bool check(const char *path, const char *kv_type) {
    ds_model *model;
    ds_session *origin, *last[N_THREADS];
    pthread_t threads[N_THREADS];
    int32_t ids[N_PAST];
    ds_error err;
    if (ds_model_open(path, &(ds_opening){.n_threads = 2}, &model, &err) != DS_OK ||
        ds_session_create(model, N_CTX, kv_type, &origin, &err) != DS_OK)
        return printf("cache_stress: %s\n", err.message), false;
    for (int i = 0; i < N_PAST; i++) ids[i] = (i * 7 + 1) % ds_model_config(model)->n_vocab;
    const ds_input input = {.session = origin, .ids = ids, .n = N_PAST};
    bool good =
        ds_eval(model, &input, 1, 0, NULL, NULL, &err) == DS_OK && run_all(model, origin) && check_child(model, origin);
    for (int i = 0; i < N_THREADS; i++) ds_session_fork(origin, N_PAST - i, &last[i], &err);
    ds_session_destroy(origin);
    ds_model_close(model); /* the last fork takes it along */
    for (int i = 0; i < N_THREADS; i++) pthread_create(&threads[i], NULL, destroy, last[i]);
    for (int i = 0; i < N_THREADS; i++) pthread_join(threads[i], NULL);
    return good;
}

int main(int argc, char **argv) {
    static const char *const KV_TYPES[] = {"f16", "q8_0", "f32"};
    bool good = argc == 2;
    for (size_t i = 0; i < sizeof KV_TYPES / sizeof *KV_TYPES && good; i++) good = check(argv[1], KV_TYPES[i]);
    puts(good ? "cache_stress: forks answer as they do alone, and every block came back" : "cache_stress: WRONG");
    return good ? 0 : 1;
}
