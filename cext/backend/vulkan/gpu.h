/* gpu.h: a GPU through Vulkan: the loader, the choice among devices, memory, shaders, commands. Knows no model. One thread
 * uses a GPU at a time.
 *
 * All memory is reached through 64-bit addresses in a shader's push constants: there are no descriptors. */
#pragma once

#include <stdbool.h>

#include "backend/vulkan/api.h"
#include "backend/work.h"
#include "base/status.h"

enum {
    DS_GPU_MAX = 16, /* devices that are looked at */
    DS_GPU_PUSH = 128, /* bytes of push constants: what every device has */
    DS_GPU_SPECS = 8, /* most specialization constants of a shader, 0 its workgroup's size */
    DS_GPU_WORKGROUP = 256, /* threads of a workgroup that shaders may count on */
    DS_GPU_SHARED = 32768, /* bytes that a workgroup shares: what shaders may count on */
    DS_GPU_ALIGN = 256, /* of what is laid into a buffer */
    DS_GPU_CHUNK = 1 << 30, /* bytes of an allocation at most: larger ones are refused by some drivers */
};

/* Pieces of that size that n are cut into. */
static inline uint32_t ds_gpu_pieces(uint32_t n, uint32_t size) { return n / size + (n % size != 0); }

/* The least multiple of a size that n are. */
static inline uint32_t ds_gpu_whole(uint32_t n, uint32_t size) { return ds_gpu_pieces(n, size) * size; }

/* Bytes of a piece that is laid into a buffer. */
static inline uint64_t ds_gpu_padded(uint64_t bytes) {
    return (bytes + DS_GPU_ALIGN - 1) / DS_GPU_ALIGN * DS_GPU_ALIGN;
}

/* A device as it is found. */
typedef struct ds_gpu_info {
    char name[256], driver[256];
    uint32_t api; /* its version of Vulkan, as VK_MAKE_API_VERSION packs it */
    uint32_t kind; /* VKB_PHYSICAL_DEVICE_TYPE_* */
    uint64_t memory; /* bytes of its own memory, */
    uint64_t free; /* and of these what the driver would give this program now; memory where it does not tell */
    uint32_t subgroup, shared_bytes;
    double tick_ns; /* of its clock; 0: it has none that a list of commands can read */
    bool int_dot, float16; /* packed dots of four bytes; arithmetic in halves */
    uint32_t coop[3]; /* rows, columns, depth of cooperative matrices of halves summed in floats; 0: it has none */
    uint32_t n_types, types[32]; /* of memory: their VKB_MEMORY_PROPERTY_* bits, */
    uint64_t type_bytes[32]; /* and the heap that each is of */
    char missing[160]; /* what the shaders need and it lacks; "" where it can be used */
} ds_gpu_info;

typedef struct ds_gpu ds_gpu;

/* Whether shaders were compiled into this build. */
bool ds_gpu_built(void);
/* The devices of this machine, as the loader tells them. DS_EDEVICE where there is no loader, or none for this system. */
ds_status ds_gpu_list(ds_gpu_info out[DS_GPU_MAX], int *n, ds_error *err);
/* Open the device of that number, or the first whose name has these letters in it; NULL or "": the best that is no software.
 * DS_EDEVICE says why not. */
ds_status ds_gpu_open(const char *which, ds_gpu **out, ds_error *err);
void ds_gpu_close(ds_gpu *gpu);
/* Whether this is the process that opened it: in one forked from that, nothing but close may be called. */
bool ds_gpu_here(const ds_gpu *gpu);
const ds_gpu_info *ds_gpu_told(const ds_gpu *gpu);

/* ---- Memory ---- */

typedef enum ds_gpu_use {
    DS_GPU_OWN, /* the device's own */
    DS_GPU_IN, /* the host writes, the device reads: of the device where the host reaches it */
    DS_GPU_OUT, /* the device writes, the host reads */
} ds_gpu_use;

typedef struct ds_gpu_buffer {
    vk_Buffer buffer;
    vk_DeviceMemory memory;
    uint64_t address, bytes;
    unsigned char *host; /* mapped, or NULL */
    uint64_t own; /* bytes of the device's own memory that it takes */
} ds_gpu_buffer;

/* Take no more than so many bytes of the device's own memory in all, from now on; 0: what there is. */
void ds_gpu_limit(ds_gpu *gpu, uint64_t bytes);
/* Bytes of it that may be taken in all. */
uint64_t ds_gpu_memory(const ds_gpu *gpu);

/* At most DS_GPU_CHUNK bytes. DS_ENOMEM where the device has no room. */
ds_status ds_gpu_buffer_new(ds_gpu *gpu, uint64_t bytes, ds_gpu_use use, ds_gpu_buffer *out, ds_error *err);
void ds_gpu_buffer_release(ds_gpu *gpu, ds_gpu_buffer *buffer);
/* Copy into a buffer; returns when it is there. */
ds_status ds_gpu_write(ds_gpu *gpu, const ds_gpu_buffer *to, uint64_t at, const void *from, uint64_t bytes,
                       ds_error *err);
ds_status ds_gpu_read(ds_gpu *gpu, const ds_gpu_buffer *from, uint64_t at, void *to, uint64_t bytes, ds_error *err);

/* ---- Shaders ---- */

/* A shader made ready, by its name and the values of its specialization constants 0, 1, ...: made once, and kept. */
ds_status ds_gpu_pipeline(ds_gpu *gpu, const char *name, const uint32_t *specs, int n_specs, vk_Pipeline *out,
                          ds_error *err);

/* ---- Commands ---- */

typedef struct ds_gpu_script ds_gpu_script;

/* Lists of commands, of which one is told at a time. A list that is told the commands that it holds from the time before is
 * not recorded again. */
typedef struct ds_gpu_commands {
    ds_gpu_script **lists;
    int n;
    int at; /* the one that is told, submitted: the caller's to set before it is told */
} ds_gpu_commands;

void ds_gpu_commands_release(ds_gpu *gpu, ds_gpu_commands *c);
/* Begin anew. */
ds_status ds_gpu_record(ds_gpu *gpu, ds_gpu_commands *c, ds_error *err);
void ds_gpu_dispatch(ds_gpu *gpu, ds_gpu_commands *c, vk_Pipeline pipeline, const void *push, uint32_t bytes,
                     uint32_t x, uint32_t y, uint32_t z);
/* What follows sees what was written before; at the beginning, and behind another, it is none. */
void ds_gpu_barrier(ds_gpu *gpu, ds_gpu_commands *c);
void ds_gpu_copy(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_buffer *from, uint64_t at, const ds_gpu_buffer *to,
                 uint64_t to_at, uint64_t bytes);
ds_status ds_gpu_recorded(ds_gpu *gpu, ds_gpu_commands *c, ds_error *err);
/* Run a list that was recorded; one at a time. What the host wrote before is seen. An empty one is not run. */
ds_status ds_gpu_submit(ds_gpu *gpu, const ds_gpu_commands *c, ds_error *err);
/* The list that is told. */
ds_gpu_script *ds_gpu_list_of(const ds_gpu_commands *c);

/* When a list runs among others. */
typedef struct ds_gpu_turn {
    vk_Semaphore
        behind; /* once this timeline semaphore, which something submitted before raises, has the value; 0: at once */
    uint64_t value;
    vk_Semaphore raises; /* and it raises this one to that, when it has run; 0: none */
    uint64_t raised;
    bool more; /* another one follows, whose wait is for both */
} ds_gpu_turn;

/* The same in its turn. May be called by another thread than the others, while none of them is but for recording. */
ds_status ds_gpu_submit_in_turn(ds_gpu *gpu, ds_gpu_script *list, const ds_gpu_turn *turn, ds_error *err);
/* Run a list ahead of what is submitted next, whose wait is for both. */
ds_status ds_gpu_submit_ahead(ds_gpu *gpu, const ds_gpu_commands *c, ds_error *err);
uint64_t ds_gpu_waits(const ds_gpu *gpu); /* that have ended since it was opened */
void ds_gpu_drain(ds_gpu *gpu); /* until it has nothing to do; who has lost it hears that from a wait */
/* Until it is done; the host then sees what it wrote. */
ds_status ds_gpu_wait(ds_gpu *gpu, ds_error *err);

/* ---- What it did (watch.c) ---- */

/* Count from zero, and time shaders from now on where `times`: lists that are recorded from here on have a clock's reading
 * behind each dispatch. DS_EUNSUPPORTED where it has no clock. */
ds_status ds_gpu_watch_begin(ds_gpu *gpu, bool times, ds_error *err);
/* The number of shaders that were timed. */
int ds_gpu_watched(const ds_gpu *gpu, ds_work_time out[DS_WORK_TIMES], ds_work *work);
/* Bytes a second of copies from and to the host's memory, by itself: two buffers of `bytes`. */
ds_status ds_gpu_rates(ds_gpu *gpu, uint64_t bytes, double *in, double *out, ds_error *err);
/* Bytes a second of a shader that reads the device's own memory, `bytes` of it, a multiple of 16: the best of some runs. */
ds_status ds_gpu_reads(ds_gpu *gpu, uint64_t bytes, double *rate, ds_error *err);
