/* vulkan.h: a GPU as a backend. */
#pragma once

#include "backend/backend.h"
#include "backend/device.h"

/* device: of kind "vulkan". DS_EUNSUPPORTED where its part of the model is not for it, by name. */
ds_status ds_gpu_backend_create(const ds_facts *facts, int number, const ds_device *device, ds_backend **out,
                                ds_error *err);
