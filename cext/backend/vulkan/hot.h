/* hot.h: routed experts that a GPU holds of a model whose experts it does not all hold: those that tokens choose of late, by
 * the worth that memory/slots.h gives them. Between steps a few go and others come; a miss is computed where it lies, by the
 * processor, and nobody waits for a copy. What lies where changes with the steps that were taken and with nothing else. */
#pragma once

#include "backend/vulkan/weights.h"
#include "memory/slots.h"

enum {
    DS_HOT_INSERTS = 2, /* a step at most: an expert is copied by the processor and over the link, and both have work */
    DS_HOT_MARGIN =
        3, /* of late uses that one must have more than what it replaces: a copy moves its bytes three times, and
                          a use saves reading them once */
};

/* An expert on its way: into the staging memory beside a step, and from there to its slot when that is over. */
typedef struct ds_hot_upload {
    int slot;
    unsigned char *to; /* staging, as the slot is laid out */
} ds_hot_upload;

/* A thread that copies experts into staging memory. */
typedef struct ds_hot_copier {
    ds_lock lock;
    ds_signal work, news;
    ds_thread thread;
    bool runs, ending;
    int n, n_done; /* uploads of the step under way, and of these the copied ones */
    ds_hot_upload uploads[DS_HOT_INSERTS];
} ds_hot_copier;

typedef struct ds_gpu_hot {
    ds_residency *residency;
    ds_gpu_weights *weights; /* whose experts' addresses it sets */
    int number; /* of the backend */
    ds_slots slots; /* none where n is 0 */
    ds_gpu_buffer *chunks;
    int n_chunks;
    int *chunk_of; /* (slots.n) */
    uint64_t *at; /* (slots.n) in its chunk */
    uint64_t *seen; /* (layers, n_expert) uses that were counted before */
    ds_gpu_buffer staging; /* DS_HOT_INSERTS for the copier to fill, and as many that the device reads */
    size_t slot_bytes; /* the largest */
    int half; /* of the staging memory, to be filled */
    ds_gpu_commands commands;
    uint64_t waits; /* that the device had had when it was last given a list */
    bool under_way; /* a list that nobody has waited for */
    int n_tok; /* of the step before */
    ds_hot_copier copier;
    ds_work_hot work;
} ds_gpu_hot;

/* In `out`, which stays where it is: experts of all layers that have any, in `bytes` of the device's memory. All are placed
 * at the processor, and these layers' feed-forward at the backend `number`. uses: (n_layer, n_expert) how often each was
 * used so far, or NULL: it begins with those used most. DS_EINVAL where that is not so, DS_ENOMEM. */
ds_status ds_gpu_hot_create(ds_gpu *gpu, const ds_facts *facts, int number, uint64_t bytes, ds_gpu_weights *weights,
                            ds_gpu_hot *out, ds_error *err);
void ds_gpu_hot_release(ds_gpu *gpu, ds_gpu_hot *hot);
/* A step of n_tok tokens begins: learn from the one before, let what was copied beside it be used, and choose what is copied
 * beside this one. A copy that cannot be had is left out. */
void ds_gpu_hot_step(ds_gpu *gpu, ds_gpu_hot *hot, int n_tok);
