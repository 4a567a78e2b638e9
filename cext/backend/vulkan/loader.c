/* loader.c: the system's Vulkan loader, if there is one, and the devices that it knows. */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "backend/vulkan/internal.h"

#define VERSION(major, minor) ((uint32_t)(major) << 22 | (uint32_t)(minor) << 12)

ds_status ds_gpu_failed(ds_error *err, vk_Result result, const char *what) {
    static const struct {
        vk_Result result;
        const char *text;
    } NAMES[] = {
        {VKR_ERROR_OUT_OF_HOST_MEMORY, "out of memory"},
        {VKR_ERROR_OUT_OF_DEVICE_MEMORY, "out of video memory"},
        {VKR_ERROR_INITIALIZATION_FAILED, "it could not be set up"},
        {VKR_ERROR_DEVICE_LOST, "the device was lost: its driver was reset, or a step took it too long"},
        {VKR_ERROR_INCOMPATIBLE_DRIVER, "no driver for it is installed"},
        {VKR_ERROR_TOO_MANY_OBJECTS, "too many allocations"},
    };
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (NAMES[i].result == result)
            return ds_fail(err,
                           result == VKR_ERROR_OUT_OF_HOST_MEMORY || result == VKR_ERROR_OUT_OF_DEVICE_MEMORY
                               ? DS_ENOMEM
                               : DS_EDEVICE,
                           "%s: %s", what, NAMES[i].text);
    return ds_fail(err, DS_EDEVICE, "%s: Vulkan's error %d", what, (int)result);
}

/* Drivers do not bear being loaded again and again: NVIDIA's fails after a few times, where it has used up what a process has
 * for threads' variables. So what was opened first stays for as long as the process does. */
static _Atomic(const ds_vulkan *) kept;

static void close_vulkan(ds_vulkan *v) {
    if (v->instance && v->f.DestroyInstance) v->f.DestroyInstance(v->instance, NULL);
    if (v->library) ds_library_close(v->library);
    *v = (ds_vulkan){0};
}

static ds_status make_instance(ds_vulkan *v, ds_error *err) {
    const vk_CreateInstance create = (vk_CreateInstance)v->get(NULL, "vkCreateInstance");
    const vk_EnumerateInstanceVersion version = (vk_EnumerateInstanceVersion)v->get(NULL, "vkEnumerateInstanceVersion");
    const vk_ApplicationInfo app = {
        .sType = VKS_APPLICATION_INFO, .pApplicationName = "dsv2", .pEngineName = "dsv2", .apiVersion = VERSION(1, 2)};
    const vk_InstanceCreateInfo info = {.sType = VKS_INSTANCE_CREATE_INFO, .pApplicationInfo = &app};
    uint32_t found = 0;
    if (!create || !version || version(&found) != VKR_SUCCESS || found < VERSION(1, 2))
        return ds_fail(err, DS_EDEVICE, "the Vulkan loader is of version %u.%u, expected 1.2 or newer", found >> 22,
                       found >> 12 & 1023);
    const vk_Result result = create(&info, NULL, &v->instance);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, "Vulkan");
#define LOAD(function, type, arguments)                                                    \
    if (!(v->f.function = (type(VK_CALL *) arguments)v->get(v->instance, "vk" #function))) \
        return ds_fail(err, DS_EDEVICE, "the Vulkan loader has no vk" #function);
    VK_INSTANCE_FUNCTIONS(LOAD)
#undef LOAD
    return DS_OK;
}

static ds_status open_vulkan(ds_vulkan *out, ds_error *err) {
    static const char *const NAMES[] = {"libvulkan.so.1", "libvulkan.1.dylib", "vulkan-1.dll"};
    ds_vulkan v = {.process = ds_process_id()};
    ds_status st = DS_OK;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES && !v.library; i++) v.library = ds_library_open(NAMES[i]);
    if (!v.library) {
        ds_fail(err, DS_EDEVICE, "no Vulkan loader (libvulkan.so.1) is installed here");
        return ds_hint(err, "it comes with the GPU's driver, or as libvulkan1 on Debian and Ubuntu");
    }
    v.get = (vk_GetInstanceProcAddr)ds_library_symbol(v.library, "vkGetInstanceProcAddr");
    if (!v.get) st = ds_fail(err, DS_EDEVICE, "the Vulkan loader here has no vkGetInstanceProcAddr");
    if (st == DS_OK) st = make_instance(&v, err);
    if (st == DS_OK) *out = v;
    else close_vulkan(&v);
    return st;
}

ds_status ds_vulkan_open(ds_vulkan *out, ds_error *err) {
    const ds_vulkan *there = atomic_load(&kept);
    if (there && there->process != ds_process_id()) {
        ds_fail(err, DS_EDEVICE, "Vulkan was opened before this process was forked, and cannot be used in it");
        return ds_hint(err, "start the process anew (spawn), or fork before a GPU is asked for");
    }
    if (there) {
        *out = *there;
        return DS_OK;
    }
    ds_vulkan *made = malloc(sizeof *made);
    if (!made) return ds_fail(err, DS_ENOMEM, "no memory for Vulkan");
    const ds_status st = open_vulkan(made, err);
    if (st != DS_OK) {
        free(made);
        return st;
    }
    if (atomic_compare_exchange_strong(&kept, &there, made)) {
        *out = *made;
        return DS_OK;
    }
    *out = *there; /* another thread was first */
    close_vulkan(made);
    free(made);
    return DS_OK;
}

ds_status ds_vulkan_devices(const ds_vulkan *v, vk_PhysicalDevice out[DS_GPU_MAX], int *n, ds_error *err) {
    uint32_t count = DS_GPU_MAX;
    const vk_Result result = v->f.EnumeratePhysicalDevices(v->instance, &count, out);
    if (result != VKR_SUCCESS && result != VKR_INCOMPLETE) return ds_gpu_failed(err, result, "Vulkan's devices");
    *n = (int)count;
    return DS_OK;
}

bool ds_vulkan_has(const ds_vulkan *v, vk_PhysicalDevice device, const char *extension) {
    uint32_t n = 0;
    bool found = false;
    if (v->f.EnumerateDeviceExtensionProperties(device, NULL, &n, NULL) != VKR_SUCCESS || !n) return false;
    vk_ExtensionProperties *all = calloc(n, sizeof *all);
    if (!all) return false;
    const vk_Result result = v->f.EnumerateDeviceExtensionProperties(device, NULL, &n, all);
    for (uint32_t i = 0; (result == VKR_SUCCESS || result == VKR_INCOMPLETE) && i < n; i++)
        found |= strcmp(all[i].extensionName, extension) == 0;
    free(all);
    return found;
}

int ds_vulkan_family(const ds_vulkan *v, vk_PhysicalDevice device) {
    vk_QueueFamilyProperties families[32];
    uint32_t n = 32;
    v->f.GetPhysicalDeviceQueueFamilyProperties(device, &n, families);
    for (uint32_t i = 0; i < n; i++)
        if (families[i].queueFlags & VKB_QUEUE_COMPUTE_BIT) return (int)i;
    return -1;
}

int ds_vulkan_copy_family(const ds_vulkan *v, vk_PhysicalDevice device, int *index) {
    const uint32_t beside =
        VKB_QUEUE_SPARSE_BINDING_BIT | VKB_QUEUE_PROTECTED_BIT; /* others compute, draw, read films */
    vk_QueueFamilyProperties families[32];
    uint32_t n = 32;
    const int compute = ds_vulkan_family(v, device);
    v->f.GetPhysicalDeviceQueueFamilyProperties(device, &n, families);
    *index = 0;
    for (uint32_t i = 0; i < n; i++)
        if ((families[i].queueFlags & ~beside) == VKB_QUEUE_TRANSFER_BIT && families[i].queueCount) return (int)i;
    if (families[compute].queueCount > 1) *index = 1;
    return compute;
}

/* The deepest shape that mul_coop.comp is made for. */
static void choose_shape(const ds_vulkan *v, vk_PhysicalDevice device, ds_gpu_info *out) {
    vk_CooperativeMatrixPropertiesKHR shapes[64] = {0};
    uint32_t n = sizeof shapes / sizeof *shapes;
    const vk_GetPhysicalDeviceCooperativeMatrixPropertiesKHR get =
        (vk_GetPhysicalDeviceCooperativeMatrixPropertiesKHR)v->get(v->instance,
                                                                   "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
    for (uint32_t i = 0; i < n; i++) shapes[i].sType = VKS_COOPERATIVE_MATRIX_PROPERTIES_KHR;
    const vk_Result result = get ? get(device, &n, shapes) : VKR_NOT_READY;
    for (uint32_t i = 0; (result == VKR_SUCCESS || result == VKR_INCOMPLETE) && i < n; i++) {
        const vk_CooperativeMatrixPropertiesKHR *s = &shapes[i];
        const bool halves = s->AType == VKB_COMPONENT_TYPE_FLOAT16_KHR && s->BType == VKB_COMPONENT_TYPE_FLOAT16_KHR;
        const bool floats =
            s->CType == VKB_COMPONENT_TYPE_FLOAT32_KHR && s->ResultType == VKB_COMPONENT_TYPE_FLOAT32_KHR;
        if (!halves || !floats || s->scope != VKB_SCOPE_SUBGROUP_KHR) continue;
        if (32 % s->MSize || 32 % s->NSize || 32 % s->KSize || s->KSize % 4) continue;
        if (s->MSize * s->NSize * s->KSize <= out->coop[0] * out->coop[1] * out->coop[2]) continue;
        out->coop[0] = s->MSize, out->coop[1] = s->NSize, out->coop[2] = s->KSize;
    }
}

/* Its work is cut by subgroups, four to a group: their size must be one. */
static bool has_one_subgroup_size(const ds_vulkan *v, vk_PhysicalDevice device) {
    vk_PhysicalDeviceSubgroupSizeControlProperties size = {.sType =
                                                               VKS_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES};
    vk_PhysicalDeviceProperties2 p2 = {.sType = VKS_PHYSICAL_DEVICE_PROPERTIES_2, .pNext = &size};
    v->f.GetPhysicalDeviceProperties2(device, &p2);
    return size.minSubgroupSize && size.minSubgroupSize == size.maxSubgroupSize && size.maxSubgroupSize <= 64;
}

static void check_coop(const ds_vulkan *v, vk_PhysicalDevice device, ds_gpu_info *out) {
    vk_PhysicalDeviceCooperativeMatrixFeaturesKHR coop = {.sType = VKS_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR};
    vk_PhysicalDeviceVulkan12Features f12 = {.sType = VKS_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, .pNext = &coop};
    vk_PhysicalDeviceFeatures2 f2 = {.sType = VKS_PHYSICAL_DEVICE_FEATURES_2, .pNext = &f12};
    if (!ds_vulkan_has(v, device, DS_VULKAN_COOP) || !has_one_subgroup_size(v, device)) return;
    v->f.GetPhysicalDeviceFeatures2(device, &f2);
    if (coop.cooperativeMatrix && f12.shaderFloat16 && f12.vulkanMemoryModel) choose_shape(v, device, out);
}

/* The first of what is not there. */
static void check_features(const ds_vulkan *v, vk_PhysicalDevice device, const vk_PhysicalDeviceLimits *limits,
                           ds_gpu_info *out) {
    vk_PhysicalDeviceShaderIntegerDotProductFeatures dot = {
        .sType = VKS_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES};
    vk_PhysicalDeviceVulkan12Features f12 = {.sType = VKS_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES};
    vk_PhysicalDeviceVulkan11Features f11 = {.sType = VKS_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, .pNext = &f12};
    vk_PhysicalDeviceFeatures2 f2 = {.sType = VKS_PHYSICAL_DEVICE_FEATURES_2, .pNext = &f11};
    const bool may_dot = ds_vulkan_has(v, device, DS_VULKAN_DOT);
    if (may_dot) f12.pNext = &dot;
    v->f.GetPhysicalDeviceFeatures2(device, &f2);
    const struct {
        uint32_t there;
        const char *name;
    } NEEDED[] = {
        {f12.bufferDeviceAddress, "buffer device addresses"},
        {f12.timelineSemaphore, "timeline semaphores"},
        {f12.scalarBlockLayout, "scalar block layout"},
        {f12.shaderInt8, "8-bit integers in shaders"},
        {f2.features.shaderInt16, "16-bit integers in shaders"},
        {f2.features.shaderInt64, "64-bit integers in shaders"},
        {f12.storageBuffer8BitAccess, "8-bit storage"},
        {f11.storageBuffer16BitAccess, "16-bit storage"},
        {ds_vulkan_family(v, device) >= 0, "a queue for compute shaders"},
        {out->shared_bytes >= DS_GPU_SHARED, "32 KiB of memory that a workgroup shares"},
        {limits->maxComputeWorkGroupInvocations >= DS_GPU_WORKGROUP &&
             limits->maxComputeWorkGroupSize[0] >= DS_GPU_WORKGROUP,
         "workgroups of 256 threads"},
    };
    for (size_t i = 0; i < sizeof NEEDED / sizeof *NEEDED && !*out->missing; i++)
        if (!NEEDED[i].there) snprintf(out->missing, sizeof out->missing, "its driver has no %s", NEEDED[i].name);
    out->int_dot = dot.shaderIntegerDotProduct;
    out->float16 = f12.shaderFloat16;
}

static void read_clock(const ds_vulkan *v, vk_PhysicalDevice device, double period, ds_gpu_info *out) {
    vk_QueueFamilyProperties families[32];
    uint32_t n = 32;
    const int family = ds_vulkan_family(v, device);
    v->f.GetPhysicalDeviceQueueFamilyProperties(device, &n, families);
    if (family >= 0 && families[family].timestampValidBits) out->tick_ns = period;
}

static void read_memory(const ds_vulkan *v, vk_PhysicalDevice device, ds_gpu_info *out) {
    vk_PhysicalDeviceMemoryBudgetPropertiesEXT budget = {.sType = VKS_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
    vk_PhysicalDeviceMemoryProperties2 m = {.sType = VKS_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
    const bool tells = ds_vulkan_has(v, device, "VK_EXT_memory_budget");
    if (tells) m.pNext = &budget;
    v->f.GetPhysicalDeviceMemoryProperties2(device, &m);
    for (uint32_t i = 0; i < m.memoryProperties.memoryHeapCount; i++) {
        const vk_MemoryHeap *heap = &m.memoryProperties.memoryHeaps[i];
        if (!(heap->flags & VKB_MEMORY_HEAP_DEVICE_LOCAL_BIT) || heap->size <= out->memory) continue;
        const uint64_t used = tells ? budget.heapUsage[i] : 0, most = tells ? budget.heapBudget[i] : heap->size;
        out->memory = heap->size;
        out->free = most > used ? most - used : 0;
    }
    out->n_types = m.memoryProperties.memoryTypeCount;
    for (uint32_t i = 0; i < out->n_types; i++) {
        out->types[i] = m.memoryProperties.memoryTypes[i].propertyFlags;
        out->type_bytes[i] = m.memoryProperties.memoryHeaps[m.memoryProperties.memoryTypes[i].heapIndex].size;
    }
}

void ds_vulkan_tell(const ds_vulkan *v, vk_PhysicalDevice device, ds_gpu_info *out) {
    vk_PhysicalDeviceProperties p;
    *out = (ds_gpu_info){0};
    v->f.GetPhysicalDeviceProperties(device, &p);
    snprintf(out->name, sizeof out->name, "%s", p.deviceName);
    out->api = p.apiVersion;
    out->kind = p.deviceType;
    out->shared_bytes = p.limits.maxComputeSharedMemorySize;
    if (p.apiVersion < VERSION(1, 2)) {
        snprintf(out->missing, sizeof out->missing, "its driver has Vulkan %u.%u, expected 1.2 or newer",
                 p.apiVersion >> 22, p.apiVersion >> 12 & 1023);
        return;
    }
    vk_PhysicalDeviceVulkan12Properties p12 = {.sType = VKS_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES};
    vk_PhysicalDeviceVulkan11Properties p11 = {.sType = VKS_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES, .pNext = &p12};
    vk_PhysicalDeviceProperties2 p2 = {.sType = VKS_PHYSICAL_DEVICE_PROPERTIES_2, .pNext = &p11};
    v->f.GetPhysicalDeviceProperties2(device, &p2);
    snprintf(out->driver, sizeof out->driver, "%.120s %.120s", p12.driverName, p12.driverInfo);
    out->subgroup = p11.subgroupSize;
    if (!(p11.subgroupSupportedStages & VKB_SHADER_STAGE_COMPUTE_BIT) ||
        !(p11.subgroupSupportedOperations & VKB_SUBGROUP_FEATURE_ARITHMETIC_BIT))
        snprintf(out->missing, sizeof out->missing, "its driver has no sums over subgroups");
    read_clock(v, device, p.limits.timestampPeriod, out);
    check_features(v, device, &p.limits, out);
    check_coop(v, device, out);
    read_memory(v, device, out);
}

ds_status ds_gpu_list(ds_gpu_info out[DS_GPU_MAX], int *n, ds_error *err) {
    vk_PhysicalDevice devices[DS_GPU_MAX];
    ds_vulkan v;
    int found = 0;
    ds_status st = ds_vulkan_open(&v, err);
    if (st == DS_OK) st = ds_vulkan_devices(&v, devices, &found, err);
    if (st != DS_OK) return st;
    for (int i = 0; i < found; i++) ds_vulkan_tell(&v, devices[i], &out[i]);
    *n = found;
    return DS_OK;
}
