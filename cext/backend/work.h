/* work.h: what a device did since it was watched. */
#pragma once

#include <stdint.h>

/* A kind of its work. Its time is from the end of what ran before: of those that run together, the last has what they took. */
typedef struct ds_work_time {
    const char *name;
    uint64_t n, ns;
} ds_work_time;

typedef struct ds_work {
    uint64_t dispatches, barriers, submissions, recordings, waits;
    uint64_t record_ns, wait_ns; /* of the host */
} ds_work;

enum { DS_WORK_TIMES = 256 /* kinds that are told apart at most */ };
