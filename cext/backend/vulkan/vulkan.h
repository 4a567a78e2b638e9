/* vulkan.h: a GPU as a backend. */
#pragma once

#include "backend/backend.h"

/* which: the device (gpu.h); memory: bytes of its own that weights may take, 0: what there is. DS_EUNSUPPORTED where its
 * part of the model is not for it, by name. */
ds_status ds_gpu_backend_create(const ds_facts *facts, int number, const char *which, uint64_t memory, ds_backend **out,
                                ds_error *err);
