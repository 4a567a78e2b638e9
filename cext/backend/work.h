/* work.h: what a device did since it was watched. */
#pragma once

#include <stdint.h>

/* A kind of its work. Its time is from the end of what ran before: of those that run together, the last has what they took. */
typedef struct ds_work_time {
    const char *name;
    uint64_t n, ns;
} ds_work_time;

/* Of routed experts that come and go on a device, where some do. Choices of decoded tokens: all, and those of experts that
 * were there. */
typedef struct ds_work_hot {
    uint64_t slots; /* experts that it has room for */
    uint64_t tokens, chosen, held;
    uint64_t uploads, upload_bytes;
} ds_work_hot;

typedef struct ds_work {
    uint64_t dispatches, barriers, submissions, recordings, waits;
    uint64_t record_ns, wait_ns; /* of the host */
    /* Routed experts of prompts that lie in the host's memory: */
    uint64_t copied_bytes, copy_ns; /* to the device, and how long something was being copied */
    uint64_t copied_experts, kept_experts; /* computed on the device, by the processor; counted once a layer and step */
    uint64_t slot_bytes; /* of the device, held for copies; 0: nothing is copied */
    double
        crossing; /* tokens of an expert from which on copying it takes less than computing it where it lies; 0: not known */
    uint64_t memory, memory_most; /* bytes of its own that are taken, now and at most since then */
    ds_work_hot hot;
} ds_work;

enum { DS_WORK_TIMES = 256 /* kinds that are told apart at most */ };
