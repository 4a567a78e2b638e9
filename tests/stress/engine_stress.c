/* engine_stress.c: one model, several workers, two sessions on two threads at once; then the same on three devices that
 * share its layers and experts. Built with ThreadSanitizer against the engine's static library; takes the path of a small
 * GGUF. Logits must be the same bits whatever the number of workers and devices, and finite. Returns 1 where they are
 * not. */
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dsv2.h"

/* Long enough for keys and values to be expanded, and for decode to split the cache between workers. */
enum { N_PROMPT = 300, N_DECODE = 8, N_CTX = 320 };

typedef struct job {
    ds_model *model;
    const char *kv_type;
    float *logits; /* (N_PROMPT + N_DECODE, n_vocab) */
    ds_error err;
    ds_status status;
} job;

/* A prompt of N_PROMPT tokens in one step, then N_DECODE steps of one. */
static void *run(void *arg) {
    job *j = arg;
    const int n_vocab = ds_model_config(j->model)->n_vocab;
    int32_t ids[N_PROMPT + N_DECODE];
    ds_session *session;
    for (int i = 0; i < N_PROMPT + N_DECODE; i++) {
        ids[i] = (i * 7 + 1) % n_vocab;
    }
    j->status = ds_session_create(j->model, N_CTX, j->kv_type, &session, &j->err);
    if (j->status != DS_OK) {
        return NULL;
    }
    ds_input prompt = {session, ids, N_PROMPT, N_PROMPT};
    j->status = ds_eval(j->model, &prompt, 1, 0, j->logits, NULL, &j->err);
    for (int i = N_PROMPT; i < N_PROMPT + N_DECODE && j->status == DS_OK; i++) {
        ds_input next = {session, ids + i, 1, 1};
        j->status = ds_eval(j->model, &next, 1, 0, j->logits + (size_t)i * n_vocab, NULL, &j->err);
    }
    ds_session_destroy(session);
    return NULL;
}

/* Two sessions of one model on two threads; both must end in `expected`, which the first call fills. */
static bool check(const char *path, const char *kv_type, int n_threads, const ds_placement *placement,
                  float **expected) {
    job jobs[2] = {0};
    pthread_t threads[2];
    ds_model *model;
    ds_error err;
    bool good = true;
    if (ds_model_open(path, &(ds_opening){.n_threads = n_threads, .placement = placement}, &model, &err) != DS_OK) {
        printf("engine_stress: %s\n", err.message);
        return false;
    }
    const size_t n = (size_t)(N_PROMPT + N_DECODE) * ds_model_config(model)->n_vocab;
    for (int i = 0; i < 2; i++) {
        jobs[i] = (job){.model = model, .kv_type = kv_type, .logits = malloc(n * sizeof(float))};
        pthread_create(&threads[i], NULL, run, &jobs[i]);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        if (jobs[i].status != DS_OK) {
            printf("engine_stress: %s\n", jobs[i].err.message);
            good = false;
        }
    }
    if (good && !*expected) {
        *expected = malloc(n * sizeof(float));
        memcpy(*expected, jobs[0].logits, n * sizeof(float));
    }
    for (int i = 0; i < 2; i++) {
        for (size_t k = 0; good && k < n; k++) {
            good = isfinite(jobs[i].logits[k]) && jobs[i].logits[k] == (*expected)[k];
            if (!good) {
                printf("engine_stress: cache %s, %d threads, session %d, logit %zu is %g, expected %g\n", kv_type,
                       n_threads, i, k, jobs[i].logits[k], (*expected)[k]);
            }
        }
        free(jobs[i].logits);
    }
    ds_model_close(model);
    return good;
}

/* Some experts of each layer on device 1, which has the ends as well; the last layer's attention on device 2. */
static bool check_placed(const char *path, const char *kv_type, int n_threads, float **expected) {
    const ds_device devices[] = {{"cpu", 2, NULL}, {"cpu", 1, NULL}};
    ds_model *model;
    ds_error err;
    if (ds_model_open(path, &(ds_opening){.n_threads = 1}, &model, &err) != DS_OK) {
        printf("engine_stress: %s\n", err.message);
        return false;
    }
    const ds_config *c = ds_model_config(model);
    const int n = c->n_layer, dense = c->n_layer_dense;
    const ds_rule rules[] = {{.part = DS_PART_ENDS, .device = 1},
                             {.part = DS_PART_ATTENTION, .device = 2, .layer_begin = n - 1, .layer_end = n},
                             {.part = DS_PART_EXPERTS,
                              .device = 1,
                              .layer_begin = dense,
                              .layer_end = n,
                              .expert_end = (c->n_expert + 1) / 2}};
    const ds_placement placement = {devices, 2, rules, dense < n ? 3 : 2};
    ds_model_close(model);
    return check(path, kv_type, n_threads, &placement, expected);
}

int main(int argc, char **argv) {
    static const char *const KV_TYPES[] = {"f16", "q8_0", "f32"};
    bool good = argc == 2;
    for (size_t i = 0; i < sizeof KV_TYPES / sizeof *KV_TYPES; i++) {
        float *expected = NULL;
        for (int n_threads = 1; n_threads <= 5 && good; n_threads++) {
            good = check(argv[1], KV_TYPES[i], n_threads, NULL, &expected);
        }
        for (int n_threads = 1; n_threads <= 2 && good; n_threads++) {
            good = check_placed(argv[1], KV_TYPES[i], n_threads, &expected);
        }
        free(expected);
    }
    puts(good ? "engine_stress: the same logits from 1 to 5 threads and on 3 devices" : "engine_stress: WRONG");
    return good ? 0 : 1;
}
