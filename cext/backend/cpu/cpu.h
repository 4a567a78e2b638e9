/* cpu.h: the processor as a backend. */
#pragma once

#include "backend/backend.h"

enum { DS_MAX_THREADS = 512 };

/* number: which of the model's backends it is. n_threads: 0 for what is fastest here. isa: NULL or "" for the best.
 * apart: it has a thread that takes in its work, and so works beside another; else the thread that waits for it is one
 * of its workers. */
ds_status ds_cpu_backend_create(const ds_facts *facts, int number, int n_threads, const char *isa, bool apart,
                                ds_backend **out, ds_error *err);
