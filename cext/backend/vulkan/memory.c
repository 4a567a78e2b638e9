/* memory.c: buffers of a GPU, each an allocation of its own, and copies to and from them. */
#include "backend/vulkan/internal.h"

#include <string.h>

enum { DS_STAGING = 32 << 20 };

/* The memory type that has all of `must` and most of `better`, the earlier bits before the later; -1: none. */
static int find_type(const ds_gpu *g, uint32_t allowed, uint32_t must, const uint32_t *better, int n_better) {
    int best = -1, best_score = -1;
    for (uint32_t i = 0; i < g->memory.memoryTypeCount; i++) {
        const uint32_t flags = g->memory.memoryTypes[i].propertyFlags;
        int score = 0;
        if (!(allowed & 1u << i) || (flags & must) != must) continue;
        for (int b = 0; b < n_better; b++) score = 2 * score + ((flags & better[b]) == better[b]);
        if (score > best_score) best = (int)i, best_score = score;
    }
    return best;
}

static int type_for(const ds_gpu *g, uint32_t allowed, ds_gpu_use use) {
    const uint32_t own = VKB_MEMORY_PROPERTY_DEVICE_LOCAL_BIT,
                   seen = VKB_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VKB_MEMORY_PROPERTY_HOST_COHERENT_BIT,
                   cached = VKB_MEMORY_PROPERTY_HOST_CACHED_BIT;
    if (use == DS_GPU_OWN) return find_type(g, allowed, 0, (uint32_t[]){own}, 1);
    if (use == DS_GPU_IN) return find_type(g, allowed, seen, (uint32_t[]){own}, 1);
    return find_type(g, allowed, seen, (uint32_t[]){cached}, 1);
}

/* Whether the host may write to the device's own memory where it lies: that is so where they share one. */
static bool shares_memory(const ds_gpu *g) {
    return g->info.kind == VKB_PHYSICAL_DEVICE_TYPE_CPU || g->info.kind == VKB_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU;
}

/* Types of the same heap as that one. */
static uint32_t of_heap(const ds_gpu *g, int type) {
    uint32_t all = 0;
    for (uint32_t i = 0; i < g->memory.memoryTypeCount; i++)
        if (g->memory.memoryTypes[i].heapIndex == g->memory.memoryTypes[type].heapIndex) all |= 1u << i;
    return all;
}

static bool is_own(const ds_gpu *g, int type) {
    return g->memory.memoryHeaps[g->memory.memoryTypes[type].heapIndex].flags & VKB_MEMORY_HEAP_DEVICE_LOCAL_BIT;
}

static vk_Result take(ds_gpu *g, uint64_t bytes, int type, vk_DeviceMemory *out) {
    if (is_own(g, type) && g->limit && (g->own > g->limit || bytes > g->limit - g->own))
        return VKR_ERROR_OUT_OF_DEVICE_MEMORY;
    const vk_MemoryAllocateFlagsInfo addressed = {.sType = VKS_MEMORY_ALLOCATE_FLAGS_INFO,
                                                  .flags = VKB_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT};
    const vk_MemoryAllocateInfo info = {.sType = VKS_MEMORY_ALLOCATE_INFO,
                                        .pNext = &addressed,
                                        .allocationSize = bytes,
                                        .memoryTypeIndex = (uint32_t)type};
    return g->v.f.AllocateMemory(g->device, &info, NULL, out);
}

static ds_status no_room(const ds_gpu *g, uint64_t bytes, ds_error *err) {
    if (!g->limit) return ds_gpu_failed(err, VKR_ERROR_OUT_OF_DEVICE_MEMORY, g->info.name);
    return ds_fail(err, DS_ENOMEM, "%s: %.1f MiB more, where it was given %.1f MiB and %.1f are taken", g->info.name,
                   (double)bytes / (1 << 20), (double)g->limit / (1 << 20), (double)g->own / (1 << 20));
}

/* What the buffer takes of the device's own memory is counted. */
static void count_own(ds_gpu *g, ds_gpu_buffer *b, uint64_t bytes) {
    b->own = bytes;
    g->own += bytes;
    if (g->own > g->own_most) g->own_most = g->own;
}

static ds_status allocate(ds_gpu *g, ds_gpu_use use, ds_gpu_buffer *b, ds_error *err) {
    const vk_functions *f = &g->v.f;
    vk_MemoryRequirements needs;
    f->GetBufferMemoryRequirements(g->device, b->buffer, &needs);
    uint32_t allowed = needs.memoryTypeBits;
    int type = type_for(g, allowed, use), next = type;
    if (type < 0) return ds_fail(err, DS_EDEVICE, "%s: none of its memory can be used so", g->info.name);
    vk_Result result = VKR_ERROR_OUT_OF_DEVICE_MEMORY;
    /* What both sides reach may lie on either: a window of the device's memory can be as small as 256 MiB. */
    while (next >= 0 && result == VKR_ERROR_OUT_OF_DEVICE_MEMORY) {
        type = next;
        result = take(g, needs.size, type, &b->memory);
        allowed &= ~of_heap(g, type);
        next = use == DS_GPU_OWN ? -1 : type_for(g, allowed, use);
    }
    if (result == VKR_ERROR_OUT_OF_DEVICE_MEMORY) return no_room(g, needs.size, err);
    const uint32_t flags = g->memory.memoryTypes[type].propertyFlags;
    if (result == VKR_SUCCESS && is_own(g, type)) count_own(g, b, needs.size);
    if (result == VKR_SUCCESS) result = f->BindBufferMemory(g->device, b->buffer, b->memory, 0);
    const bool reached = flags & VKB_MEMORY_PROPERTY_HOST_VISIBLE_BIT && flags & VKB_MEMORY_PROPERTY_HOST_COHERENT_BIT;
    if (result == VKR_SUCCESS && reached && (use != DS_GPU_OWN || shares_memory(g)))
        result = f->MapMemory(g->device, b->memory, 0, UINT64_MAX, 0, (void **)&b->host);
    return result == VKR_SUCCESS ? DS_OK : ds_gpu_failed(err, result, g->info.name);
}

ds_status ds_gpu_buffer_new(ds_gpu *g, uint64_t bytes, ds_gpu_use use, ds_gpu_buffer *out, ds_error *err) {
    const vk_functions *f = &g->v.f;
    if (!bytes) bytes = DS_GPU_ALIGN;
    if (bytes > DS_GPU_CHUNK)
        return ds_fail(err, DS_EUNSUPPORTED, "%s: a piece of %.1f MiB, and no allocation is larger than %d MiB",
                       g->info.name, (double)bytes / (1 << 20), DS_GPU_CHUNK >> 20);
    ds_gpu_buffer b = {.bytes = bytes};
    const vk_BufferCreateInfo info = {
        .sType = VKS_BUFFER_CREATE_INFO,
        .size = bytes,
        .usage = VKB_BUFFER_USAGE_STORAGE_BUFFER_BIT | VKB_BUFFER_USAGE_TRANSFER_SRC_BIT |
                 VKB_BUFFER_USAGE_TRANSFER_DST_BIT | VKB_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT,
                                      /* Queues of two families use it, which costs a buffer nothing. */
        .sharingMode = g->n_families > 1 ? VKB_SHARING_MODE_CONCURRENT : VKB_SHARING_MODE_EXCLUSIVE,
        .queueFamilyIndexCount = g->n_families > 1 ? g->n_families : 0,
        .pQueueFamilyIndices = g->families};
    const vk_Result result = f->CreateBuffer(g->device, &info, NULL, &b.buffer);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, g->info.name);
    const ds_status st = allocate(g, use, &b, err);
    if (st != DS_OK) {
        ds_gpu_buffer_release(g, &b);
        return st;
    }
    b.address = f->GetBufferDeviceAddress(
        g->device, &(vk_BufferDeviceAddressInfo){.sType = VKS_BUFFER_DEVICE_ADDRESS_INFO, .buffer = b.buffer});
    *out = b;
    return DS_OK;
}

void ds_gpu_buffer_release(ds_gpu *g, ds_gpu_buffer *b) {
    if (b->buffer) g->v.f.DestroyBuffer(g->device, b->buffer, NULL);
    if (b->memory) g->v.f.FreeMemory(g->device, b->memory, NULL); /* and its mapping with it */
    g->own -= b->own;
    *b = (ds_gpu_buffer){0};
}

void ds_gpu_limit(ds_gpu *g, uint64_t bytes) { g->limit = bytes; }

uint64_t ds_gpu_memory(const ds_gpu *g) { return g->limit && g->limit < g->info.memory ? g->limit : g->info.memory; }

static ds_status stage(ds_gpu *g, ds_error *err) {
    return g->staging.buffer ? DS_OK : ds_gpu_buffer_new(g, DS_STAGING, DS_GPU_OUT, &g->staging, err);
}

static ds_status copy_now(ds_gpu *g, const ds_gpu_buffer *from, uint64_t at, const ds_gpu_buffer *to, uint64_t to_at,
                          uint64_t bytes, ds_error *err) {
    ds_status st = ds_gpu_record(g, &g->copies, err);
    if (st != DS_OK) return st;
    ds_gpu_copy(g, &g->copies, from, at, to, to_at, bytes);
    if ((st = ds_gpu_recorded(g, &g->copies, err)) == DS_OK) st = ds_gpu_submit(g, &g->copies, err);
    return st == DS_OK ? ds_gpu_wait(g, err) : st;
}

ds_status ds_gpu_write(ds_gpu *g, const ds_gpu_buffer *to, uint64_t at, const void *from, uint64_t bytes,
                       ds_error *err) {
    if (to->host) return memcpy(to->host + at, from, bytes), DS_OK;
    ds_status st = stage(g, err);
    for (uint64_t done = 0, n; done < bytes && st == DS_OK; done += n) {
        n = bytes - done < DS_STAGING ? bytes - done : DS_STAGING;
        memcpy(g->staging.host, (const unsigned char *)from + done, n);
        st = copy_now(g, &g->staging, 0, to, at + done, n, err);
    }
    return st;
}

ds_status ds_gpu_read(ds_gpu *g, const ds_gpu_buffer *from, uint64_t at, void *to, uint64_t bytes, ds_error *err) {
    if (from->host) return memcpy(to, from->host + at, bytes), DS_OK;
    ds_status st = stage(g, err);
    for (uint64_t done = 0, n; done < bytes && st == DS_OK; done += n) {
        n = bytes - done < DS_STAGING ? bytes - done : DS_STAGING;
        if ((st = copy_now(g, from, at + done, &g->staging, 0, n, err)) == DS_OK)
            memcpy((unsigned char *)to + done, g->staging.host, n);
    }
    return st;
}
