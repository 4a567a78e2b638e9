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
/* Those to copy on beside them: of a family that does nothing else, where there is one, or a second one of the same family,
 * or the same. *index: which of its family. */
int ds_vulkan_copy_family(const ds_vulkan *v, vk_PhysicalDevice device, int *index);
/* What Vulkan refused, as an error of ours. */
ds_status ds_gpu_failed(ds_error *err, vk_Result result, const char *what);

typedef struct ds_gpu_made {
    const char *name; /* of its shader */
    uint32_t specs[DS_GPU_SPECS];
    int n_specs;
    vk_Pipeline pipeline;
    int next; /* of the same hash, its number + 1; 0: none */
} ds_gpu_made;

enum { DS_MADE_HEADS = 256 };

/* ---- commands.c ---- */

typedef enum ds_gpu_kind { DS_GPU_BARRIER, DS_GPU_DISPATCH, DS_GPU_COPY } ds_gpu_kind;

typedef struct ds_gpu_command {
    ds_gpu_kind kind;
    uint32_t bytes, x, y, z;
    vk_Pipeline pipeline;
    vk_Buffer from, to;
    vk_BufferCopy region;
    unsigned char push[DS_GPU_PUSH];
} ds_gpu_command;

struct ds_gpu_script {
    vk_CommandBuffer list;
    ds_gpu_command *log;
    int n, room; /* of the log */
    int at; /* commands that were told this time */
    int n_dispatches, n_barriers;
    bool ready; /* what the log says is recorded */
    bool same; /* and is what was told this time, as yet */
    bool full; /* no memory for one */
    bool watched; /* recorded with clocks */
    struct ds_gpu_script *before; /* that runs before it, and was not waited for; or NULL */
    struct ds_gpu_watch *watch;
};

struct ds_gpu {
    ds_vulkan v;
    ds_gpu_info info;
    vk_PhysicalDevice physical;
    vk_Device device;
    vk_Queue queue, copy_queue; /* may be one */
    uint32_t families[2]; /* of both; n_families 1 where they are of one */
    uint32_t n_families;
    ds_lock turn; /* of who submits: copies have threads of their own */
    bool has_turn;
    vk_CommandPool pool;
    vk_PipelineLayout layout;
    vk_Fence fence;
    vk_PhysicalDeviceMemoryProperties memory;
    uint64_t limit; /* of its own memory; 0: none */
    uint64_t own, own_most; /* bytes of that which are taken, and that ever were since it was watched */
    ds_gpu_made *made;
    int n_made, made_heads[DS_MADE_HEADS]; /* by hash, a number + 1 */
    ds_gpu_buffer staging; /* through which is copied what the host does not reach */
    ds_gpu_commands copies;
    bool busy; /* something was submitted, and not waited for */
    uint64_t n_waits; /* that have ended */
    bool watched; /* lists are recorded with clocks */
    ds_work_time times[DS_WORK_TIMES];
    int n_times;
    ds_work work;
    ds_gpu_script *running; /* what was submitted last, of what nobody has waited for */
    int64_t process; /* that opened it: a forked child has no part in it */
};

/* ---- watch.c ---- */

typedef struct ds_gpu_watch ds_gpu_watch;

/* At the beginning of a list; behind a dispatch; when it has run. */
void ds_gpu_watch_record(ds_gpu *g, ds_gpu_script *c);
void ds_gpu_watch_dispatched(ds_gpu *g, ds_gpu_script *c, vk_Pipeline pipeline);
void ds_gpu_watch_take(ds_gpu *g, const ds_gpu_script *c);
void ds_gpu_watch_forget(ds_gpu *g, ds_gpu_script *c);
