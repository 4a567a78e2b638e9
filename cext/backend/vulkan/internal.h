/* internal.h: what the files behind gpu.h share. */
#pragma once

#include <stdlib.h>

#include "backend/vulkan/gpu.h"
#include "base/os.h"

#define DS_VULKAN_COOP "VK_KHR_cooperative_matrix"
#define DS_VULKAN_DOT "VK_KHR_shader_integer_dot_product"

/* The loader and an instance of it. */
typedef struct ds_vulkan {
    void *library;
    vk_GetInstanceProcAddr get;
    vk_Instance instance;
    vk_functions f;
    int64_t process; /* that opened it */
} ds_vulkan;

/* That of this process: opened once, and kept. */
ds_status ds_vulkan_open(ds_vulkan *out, ds_error *err);
ds_status ds_vulkan_devices(const ds_vulkan *v, vk_PhysicalDevice out[DS_GPU_MAX], int *n, ds_error *err);
void ds_vulkan_tell(const ds_vulkan *v, vk_PhysicalDevice device, ds_gpu_info *out);
bool ds_vulkan_has(const ds_vulkan *v, vk_PhysicalDevice device, const char *extension);
/* The queues to compute on; -1: none. */
int ds_vulkan_family(const ds_vulkan *v, vk_PhysicalDevice device);
/* What Vulkan refused, as an error of ours. */
ds_status ds_gpu_failed(ds_error *err, vk_Result result, const char *what);

typedef struct ds_gpu_made {
    const char *name; /* of its shader */
    uint32_t specs[DS_GPU_SPECS];
    int n_specs;
    vk_Pipeline pipeline;
} ds_gpu_made;

struct ds_gpu {
    ds_vulkan v;
    ds_gpu_info info;
    vk_PhysicalDevice physical;
    vk_Device device;
    vk_Queue queue;
    vk_CommandPool pool;
    vk_PipelineLayout layout;
    vk_Fence fence;
    vk_PhysicalDeviceMemoryProperties memory;
    ds_gpu_made *made;
    int n_made;
    ds_gpu_buffer staging; /* through which is copied what the host does not reach */
    ds_gpu_commands copies;
    bool busy; /* something was submitted, and not waited for */
    bool watched; /* lists are recorded with clocks */
    ds_work_time times[DS_WORK_TIMES];
    int n_times;
    ds_work work;
    const ds_gpu_commands *running; /* what was submitted last */
    int64_t process; /* that opened it: a forked child has no part in it */
};

/* ---- watch.c ---- */

/* At the beginning of a list; behind a dispatch; when it has run. */
void ds_gpu_watch_record(ds_gpu *g, ds_gpu_commands *c);
void ds_gpu_watch_dispatched(ds_gpu *g, ds_gpu_commands *c, vk_Pipeline pipeline);
void ds_gpu_watch_take(ds_gpu *g, const ds_gpu_commands *c);
