/* disk.h: a residency whose routed experts are read from the file as layers need them, into as many slots as a budget
 * holds. */
#pragma once

#include "memory/budget.h"
#include "memory/residency.h"

/* Weights bound to the mapping of `gguf`; bytes: for slots. cached: reads go through the system's cache, and are dropped
 * from it. budget is copied; its `stop` may be asked as long as the residency is there. */
ds_status ds_residency_disk(const ds_config *config, const ds_weights *weights, const ds_gguf *gguf, size_t bytes,
                            bool cached, const ds_budget *budget, ds_residency **out, ds_error *err);
