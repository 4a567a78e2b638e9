/* api.h: what is used here of Vulkan 1.2, in declarations of our own, so that no header of the system's is needed to build.
 * Structures have the specification's members under the specification's names; what is not used of one is passed over in
 * members called pass. tests/engine/test_vulkan_api.py compares all of it with Khronos's header where there is one. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define VK_CALL __stdcall
#else
#define VK_CALL
#endif

typedef struct vk_Instance_T *vk_Instance;
typedef struct vk_PhysicalDevice_T *vk_PhysicalDevice;
typedef struct vk_Device_T *vk_Device;
typedef struct vk_Queue_T *vk_Queue;
typedef struct vk_CommandBuffer_T *vk_CommandBuffer;
/* Handles that may be numbers: 64 bits everywhere. */
typedef uint64_t vk_Buffer, vk_DeviceMemory, vk_ShaderModule, vk_PipelineLayout, vk_Pipeline, vk_CommandPool, vk_Fence,
    vk_QueryPool, vk_Semaphore;
typedef int32_t vk_Result;

enum {
    VKR_SUCCESS = 0,
    VKR_NOT_READY = 1,
    VKR_TIMEOUT = 2,
    VKR_INCOMPLETE = 5,
    VKR_ERROR_OUT_OF_HOST_MEMORY = -1,
    VKR_ERROR_OUT_OF_DEVICE_MEMORY = -2,
    VKR_ERROR_INITIALIZATION_FAILED = -3,
    VKR_ERROR_DEVICE_LOST = -4,
    VKR_ERROR_INCOMPATIBLE_DRIVER = -9,
    VKR_ERROR_TOO_MANY_OBJECTS = -10,
};

/* VkStructureType */
enum {
    VKS_APPLICATION_INFO = 0,
    VKS_INSTANCE_CREATE_INFO = 1,
    VKS_DEVICE_QUEUE_CREATE_INFO = 2,
    VKS_DEVICE_CREATE_INFO = 3,
    VKS_SUBMIT_INFO = 4,
    VKS_MEMORY_ALLOCATE_INFO = 5,
    VKS_FENCE_CREATE_INFO = 8,
    VKS_SEMAPHORE_CREATE_INFO = 9,
    VKS_QUERY_POOL_CREATE_INFO = 11,
    VKS_BUFFER_CREATE_INFO = 12,
    VKS_SHADER_MODULE_CREATE_INFO = 16,
    VKS_PIPELINE_SHADER_STAGE_CREATE_INFO = 18,
    VKS_COMPUTE_PIPELINE_CREATE_INFO = 29,
    VKS_PIPELINE_LAYOUT_CREATE_INFO = 30,
    VKS_COMMAND_POOL_CREATE_INFO = 39,
    VKS_COMMAND_BUFFER_ALLOCATE_INFO = 40,
    VKS_COMMAND_BUFFER_BEGIN_INFO = 42,
    VKS_MEMORY_BARRIER = 46,
    VKS_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES = 49,
    VKS_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES = 50,
    VKS_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES = 51,
    VKS_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES = 52,
    VKS_PHYSICAL_DEVICE_FEATURES_2 = 1000059000,
    VKS_PHYSICAL_DEVICE_PROPERTIES_2 = 1000059001,
    VKS_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2 = 1000059006,
    VKS_MEMORY_ALLOCATE_FLAGS_INFO = 1000060000,
    VKS_SEMAPHORE_TYPE_CREATE_INFO = 1000207002,
    VKS_TIMELINE_SEMAPHORE_SUBMIT_INFO = 1000207003,
    VKS_SEMAPHORE_WAIT_INFO = 1000207004,
    VKS_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES = 1000225000,
    VKS_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT = 1000237000,
    VKS_BUFFER_DEVICE_ADDRESS_INFO = 1000244001,
    VKS_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES = 1000280000,
    VKS_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR = 1000506000,
    VKS_COOPERATIVE_MATRIX_PROPERTIES_KHR = 1000506001,
};

/* Bits and small numbers. */
enum {
    VKB_QUEUE_COMPUTE_BIT = 2,
    VKB_QUEUE_TRANSFER_BIT = 4,
    VKB_QUEUE_SPARSE_BINDING_BIT = 8,
    VKB_QUEUE_PROTECTED_BIT = 16,
    VKB_MEMORY_PROPERTY_DEVICE_LOCAL_BIT = 1,
    VKB_MEMORY_PROPERTY_HOST_VISIBLE_BIT = 2,
    VKB_MEMORY_PROPERTY_HOST_COHERENT_BIT = 4,
    VKB_MEMORY_PROPERTY_HOST_CACHED_BIT = 8,
    VKB_MEMORY_HEAP_DEVICE_LOCAL_BIT = 1,
    VKB_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT = 2,
    VKB_BUFFER_USAGE_TRANSFER_SRC_BIT = 1,
    VKB_BUFFER_USAGE_TRANSFER_DST_BIT = 2,
    VKB_BUFFER_USAGE_STORAGE_BUFFER_BIT = 32,
    VKB_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT = 131072,
    VKB_SHADER_STAGE_COMPUTE_BIT = 32,
    VKB_SUBGROUP_FEATURE_ARITHMETIC_BIT = 4,
    VKB_PIPELINE_STAGE_COMPUTE_SHADER_BIT = 2048,
    VKB_PIPELINE_STAGE_TRANSFER_BIT = 4096,
    VKB_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT = 8192,
    VKB_PIPELINE_STAGE_HOST_BIT = 16384,
    VKB_ACCESS_SHADER_READ_BIT = 32,
    VKB_ACCESS_SHADER_WRITE_BIT = 64,
    VKB_ACCESS_TRANSFER_READ_BIT = 2048,
    VKB_ACCESS_TRANSFER_WRITE_BIT = 4096,
    VKB_ACCESS_HOST_READ_BIT = 8192,
    VKB_ACCESS_HOST_WRITE_BIT = 16384,
    VKB_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT = 2,
    VKB_PIPELINE_BIND_POINT_COMPUTE = 1,
    VKB_COMMAND_BUFFER_LEVEL_PRIMARY = 0,
    VKB_SHARING_MODE_EXCLUSIVE = 0,
    VKB_SHARING_MODE_CONCURRENT = 1,
    VKB_SEMAPHORE_TYPE_TIMELINE = 1,
    VKB_QUERY_TYPE_TIMESTAMP = 2,
    VKB_QUERY_RESULT_64_BIT = 1,
    VKB_QUERY_RESULT_WAIT_BIT = 2,
    VKB_COMPONENT_TYPE_FLOAT16_KHR = 0,
    VKB_COMPONENT_TYPE_FLOAT32_KHR = 1,
    VKB_SCOPE_SUBGROUP_KHR = 3,
    VKB_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU = 1,
    VKB_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU = 2,
    VKB_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU = 3,
    VKB_PHYSICAL_DEVICE_TYPE_CPU = 4,
};

/* clang-format off */
typedef struct vk_ApplicationInfo {
    uint32_t sType; const void *pNext;
    const char *pApplicationName; uint32_t applicationVersion;
    const char *pEngineName; uint32_t engineVersion, apiVersion;
} vk_ApplicationInfo;

typedef struct vk_InstanceCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags;
    const vk_ApplicationInfo *pApplicationInfo;
    uint32_t enabledLayerCount; const char *const *ppEnabledLayerNames;
    uint32_t enabledExtensionCount; const char *const *ppEnabledExtensionNames;
} vk_InstanceCreateInfo;

typedef struct vk_PhysicalDeviceLimits {
    uint32_t pass0[8], maxPushConstantsSize, maxMemoryAllocationCount, pass1;
    uint64_t pass2[2]; uint32_t pass3[38], maxComputeSharedMemorySize, maxComputeWorkGroupCount[3],
        maxComputeWorkGroupInvocations, maxComputeWorkGroupSize[3], pass4[14];
    size_t minMemoryMapAlignment; uint64_t pass5[3]; uint32_t pass6[22]; float timestampPeriod; uint32_t pass7[12];
    uint64_t pass8[2], nonCoherentAtomSize;
} vk_PhysicalDeviceLimits;

typedef struct vk_PhysicalDeviceSparseProperties { uint32_t pass[5]; } vk_PhysicalDeviceSparseProperties;

typedef struct vk_PhysicalDeviceProperties {
    uint32_t apiVersion, driverVersion, vendorID, deviceID, deviceType;
    char deviceName[256]; uint8_t pipelineCacheUUID[16];
    vk_PhysicalDeviceLimits limits; vk_PhysicalDeviceSparseProperties sparseProperties;
} vk_PhysicalDeviceProperties;

typedef struct vk_PhysicalDeviceProperties2 {
    uint32_t sType; void *pNext; vk_PhysicalDeviceProperties properties;
} vk_PhysicalDeviceProperties2;

typedef struct vk_PhysicalDeviceVulkan11Properties {
    uint32_t sType; void *pNext;
    uint8_t deviceUUID[16], driverUUID[16], deviceLUID[8];
    uint32_t deviceNodeMask, deviceLUIDValid, subgroupSize, subgroupSupportedStages, subgroupSupportedOperations, pass[6];
    uint64_t maxMemoryAllocationSize;
} vk_PhysicalDeviceVulkan11Properties;

typedef struct vk_PhysicalDeviceVulkan12Properties {
    uint32_t sType; void *pNext;
    uint32_t driverID; char driverName[256], driverInfo[256];
    uint32_t pass0[47]; uint64_t maxTimelineSemaphoreValueDifference; uint32_t pass1;
} vk_PhysicalDeviceVulkan12Properties;

typedef struct vk_PhysicalDeviceFeatures {
    uint32_t pass0[40], shaderInt64, shaderInt16, pass1[13];
} vk_PhysicalDeviceFeatures;

typedef struct vk_PhysicalDeviceFeatures2 {
    uint32_t sType; void *pNext; vk_PhysicalDeviceFeatures features;
} vk_PhysicalDeviceFeatures2;

typedef struct vk_PhysicalDeviceVulkan11Features {
    uint32_t sType; void *pNext;
    uint32_t storageBuffer16BitAccess, uniformAndStorageBuffer16BitAccess, pass[10];
} vk_PhysicalDeviceVulkan11Features;

typedef struct vk_PhysicalDeviceVulkan12Features {
    uint32_t sType; void *pNext;
    uint32_t pass0[2], storageBuffer8BitAccess, uniformAndStorageBuffer8BitAccess, pass1[3], shaderFloat16, shaderInt8,
        pass2[22], scalarBlockLayout, pass3[5], timelineSemaphore, bufferDeviceAddress, pass4[2], vulkanMemoryModel,
        vulkanMemoryModelDeviceScope, pass5[4];
} vk_PhysicalDeviceVulkan12Features;

typedef struct vk_PhysicalDeviceShaderIntegerDotProductFeatures {
    uint32_t sType; void *pNext; uint32_t shaderIntegerDotProduct;
} vk_PhysicalDeviceShaderIntegerDotProductFeatures;

/* Of VK_KHR_cooperative_matrix, which headers before 1.3.255 lack. */
typedef struct vk_PhysicalDeviceCooperativeMatrixFeaturesKHR {
    uint32_t sType; void *pNext; uint32_t cooperativeMatrix, pass0;
} vk_PhysicalDeviceCooperativeMatrixFeaturesKHR;

typedef struct vk_CooperativeMatrixPropertiesKHR {
    uint32_t sType; void *pNext; uint32_t MSize, NSize, KSize;
    uint32_t AType, BType, CType, ResultType, pass0, scope;
} vk_CooperativeMatrixPropertiesKHR;

typedef struct vk_PhysicalDeviceSubgroupSizeControlProperties {
    uint32_t sType; void *pNext; uint32_t minSubgroupSize, maxSubgroupSize, pass[2];
} vk_PhysicalDeviceSubgroupSizeControlProperties;

typedef struct vk_MemoryType { uint32_t propertyFlags, heapIndex; } vk_MemoryType;
typedef struct vk_MemoryHeap { uint64_t size; uint32_t flags; } vk_MemoryHeap;

typedef struct vk_PhysicalDeviceMemoryProperties {
    uint32_t memoryTypeCount; vk_MemoryType memoryTypes[32];
    uint32_t memoryHeapCount; vk_MemoryHeap memoryHeaps[16];
} vk_PhysicalDeviceMemoryProperties;

typedef struct vk_PhysicalDeviceMemoryProperties2 {
    uint32_t sType; void *pNext; vk_PhysicalDeviceMemoryProperties memoryProperties;
} vk_PhysicalDeviceMemoryProperties2;

typedef struct vk_PhysicalDeviceMemoryBudgetPropertiesEXT {
    uint32_t sType; void *pNext; uint64_t heapBudget[16], heapUsage[16];
} vk_PhysicalDeviceMemoryBudgetPropertiesEXT;

typedef struct vk_Extent3D { uint32_t width, height, depth; } vk_Extent3D;

typedef struct vk_QueueFamilyProperties {
    uint32_t queueFlags, queueCount, timestampValidBits; vk_Extent3D minImageTransferGranularity;
} vk_QueueFamilyProperties;

typedef struct vk_ExtensionProperties { char extensionName[256]; uint32_t specVersion; } vk_ExtensionProperties;

typedef struct vk_DeviceQueueCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags, queueFamilyIndex, queueCount; const float *pQueuePriorities;
} vk_DeviceQueueCreateInfo;

typedef struct vk_DeviceCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags, queueCreateInfoCount;
    const vk_DeviceQueueCreateInfo *pQueueCreateInfos;
    uint32_t enabledLayerCount; const char *const *ppEnabledLayerNames;
    uint32_t enabledExtensionCount; const char *const *ppEnabledExtensionNames;
    const vk_PhysicalDeviceFeatures *pEnabledFeatures;
} vk_DeviceCreateInfo;

typedef struct vk_BufferCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags; uint64_t size; uint32_t usage, sharingMode, queueFamilyIndexCount;
    const uint32_t *pQueueFamilyIndices;
} vk_BufferCreateInfo;

typedef struct vk_MemoryRequirements { uint64_t size, alignment; uint32_t memoryTypeBits; } vk_MemoryRequirements;

typedef struct vk_MemoryAllocateInfo {
    uint32_t sType; const void *pNext; uint64_t allocationSize; uint32_t memoryTypeIndex;
} vk_MemoryAllocateInfo;

typedef struct vk_MemoryAllocateFlagsInfo {
    uint32_t sType; const void *pNext; uint32_t flags, deviceMask;
} vk_MemoryAllocateFlagsInfo;

typedef struct vk_BufferDeviceAddressInfo { uint32_t sType; const void *pNext; vk_Buffer buffer; } vk_BufferDeviceAddressInfo;

typedef struct vk_ShaderModuleCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags; size_t codeSize; const uint32_t *pCode;
} vk_ShaderModuleCreateInfo;

typedef struct vk_PushConstantRange { uint32_t stageFlags, offset, size; } vk_PushConstantRange;

typedef struct vk_PipelineLayoutCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags, setLayoutCount; const uint64_t *pSetLayouts;
    uint32_t pushConstantRangeCount; const vk_PushConstantRange *pPushConstantRanges;
} vk_PipelineLayoutCreateInfo;

typedef struct vk_SpecializationMapEntry { uint32_t constantID, offset; size_t size; } vk_SpecializationMapEntry;

typedef struct vk_SpecializationInfo {
    uint32_t mapEntryCount; const vk_SpecializationMapEntry *pMapEntries; size_t dataSize; const void *pData;
} vk_SpecializationInfo;

typedef struct vk_PipelineShaderStageCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags, stage; vk_ShaderModule module; const char *pName;
    const vk_SpecializationInfo *pSpecializationInfo;
} vk_PipelineShaderStageCreateInfo;

typedef struct vk_ComputePipelineCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags; vk_PipelineShaderStageCreateInfo stage; vk_PipelineLayout layout;
    vk_Pipeline basePipelineHandle; int32_t basePipelineIndex;
} vk_ComputePipelineCreateInfo;

typedef struct vk_CommandPoolCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags, queueFamilyIndex;
} vk_CommandPoolCreateInfo;

typedef struct vk_CommandBufferAllocateInfo {
    uint32_t sType; const void *pNext; vk_CommandPool commandPool; uint32_t level, commandBufferCount;
} vk_CommandBufferAllocateInfo;

typedef struct vk_CommandBufferBeginInfo {
    uint32_t sType; const void *pNext; uint32_t flags; const void *pInheritanceInfo;
} vk_CommandBufferBeginInfo;

typedef struct vk_MemoryBarrier {
    uint32_t sType; const void *pNext; uint32_t srcAccessMask, dstAccessMask;
} vk_MemoryBarrier;

typedef struct vk_BufferCopy { uint64_t srcOffset, dstOffset, size; } vk_BufferCopy;

typedef struct vk_FenceCreateInfo { uint32_t sType; const void *pNext; uint32_t flags; } vk_FenceCreateInfo;

typedef struct vk_SemaphoreCreateInfo { uint32_t sType; const void *pNext; uint32_t flags; } vk_SemaphoreCreateInfo;

typedef struct vk_SemaphoreTypeCreateInfo {
    uint32_t sType; const void *pNext; int32_t semaphoreType; uint64_t initialValue;
} vk_SemaphoreTypeCreateInfo;

typedef struct vk_TimelineSemaphoreSubmitInfo {
    uint32_t sType; const void *pNext;
    uint32_t waitSemaphoreValueCount; const uint64_t *pWaitSemaphoreValues;
    uint32_t signalSemaphoreValueCount; const uint64_t *pSignalSemaphoreValues;
} vk_TimelineSemaphoreSubmitInfo;

typedef struct vk_SemaphoreWaitInfo {
    uint32_t sType; const void *pNext; uint32_t flags, semaphoreCount;
    const vk_Semaphore *pSemaphores; const uint64_t *pValues;
} vk_SemaphoreWaitInfo;

typedef struct vk_QueryPoolCreateInfo {
    uint32_t sType; const void *pNext; uint32_t flags; int32_t queryType; uint32_t queryCount, pipelineStatistics;
} vk_QueryPoolCreateInfo;

typedef struct vk_SubmitInfo {
    uint32_t sType; const void *pNext;
    uint32_t waitSemaphoreCount; const uint64_t *pWaitSemaphores; const uint32_t *pWaitDstStageMask;
    uint32_t commandBufferCount; const vk_CommandBuffer *pCommandBuffers;
    uint32_t signalSemaphoreCount; const uint64_t *pSignalSemaphores;
} vk_SubmitInfo;

/* Functions: F(name, result, arguments). Of an instance, and of a device. */
typedef void (VK_CALL *vk_Function)(void);
typedef vk_Function (VK_CALL *vk_GetInstanceProcAddr)(vk_Instance instance, const char *name);
typedef vk_Result (VK_CALL *vk_GetPhysicalDeviceCooperativeMatrixPropertiesKHR)(
    vk_PhysicalDevice device, uint32_t *n, vk_CooperativeMatrixPropertiesKHR *out);
typedef vk_Result (VK_CALL *vk_CreateInstance)(const vk_InstanceCreateInfo *info, const void *allocator, vk_Instance *out);
typedef vk_Result (VK_CALL *vk_EnumerateInstanceVersion)(uint32_t *out);

#define VK_INSTANCE_FUNCTIONS(F) \
    F(DestroyInstance, void, (vk_Instance instance, const void *allocator)) \
    F(EnumeratePhysicalDevices, vk_Result, (vk_Instance instance, uint32_t *n, vk_PhysicalDevice *out)) \
    F(GetPhysicalDeviceProperties, void, (vk_PhysicalDevice device, vk_PhysicalDeviceProperties *out)) \
    F(GetPhysicalDeviceProperties2, void, (vk_PhysicalDevice device, vk_PhysicalDeviceProperties2 *out)) \
    F(GetPhysicalDeviceFeatures2, void, (vk_PhysicalDevice device, vk_PhysicalDeviceFeatures2 *out)) \
    F(GetPhysicalDeviceMemoryProperties2, void, (vk_PhysicalDevice device, vk_PhysicalDeviceMemoryProperties2 *out)) \
    F(GetPhysicalDeviceQueueFamilyProperties, void, (vk_PhysicalDevice device, uint32_t *n, vk_QueueFamilyProperties *out)) \
    F(EnumerateDeviceExtensionProperties, vk_Result, \
      (vk_PhysicalDevice device, const char *layer, uint32_t *n, vk_ExtensionProperties *out)) \
    F(CreateDevice, vk_Result, \
      (vk_PhysicalDevice device, const vk_DeviceCreateInfo *info, const void *allocator, vk_Device *out)) \
    F(GetDeviceProcAddr, vk_Function, (vk_Device device, const char *name))

#define VK_DEVICE_FUNCTIONS(F) \
    F(DestroyDevice, void, (vk_Device device, const void *allocator)) \
    F(DeviceWaitIdle, vk_Result, (vk_Device device)) \
    F(GetDeviceQueue, void, (vk_Device device, uint32_t family, uint32_t index, vk_Queue *out)) \
    F(CreateBuffer, vk_Result, (vk_Device device, const vk_BufferCreateInfo *info, const void *allocator, vk_Buffer *out)) \
    F(DestroyBuffer, void, (vk_Device device, vk_Buffer buffer, const void *allocator)) \
    F(GetBufferMemoryRequirements, void, (vk_Device device, vk_Buffer buffer, vk_MemoryRequirements *out)) \
    F(GetBufferDeviceAddress, uint64_t, (vk_Device device, const vk_BufferDeviceAddressInfo *info)) \
    F(AllocateMemory, vk_Result, \
      (vk_Device device, const vk_MemoryAllocateInfo *info, const void *allocator, vk_DeviceMemory *out)) \
    F(FreeMemory, void, (vk_Device device, vk_DeviceMemory memory, const void *allocator)) \
    F(BindBufferMemory, vk_Result, (vk_Device device, vk_Buffer buffer, vk_DeviceMemory memory, uint64_t offset)) \
    F(MapMemory, vk_Result, \
      (vk_Device device, vk_DeviceMemory memory, uint64_t offset, uint64_t size, uint32_t flags, void **out)) \
    F(CreateShaderModule, vk_Result, \
      (vk_Device device, const vk_ShaderModuleCreateInfo *info, const void *allocator, vk_ShaderModule *out)) \
    F(DestroyShaderModule, void, (vk_Device device, vk_ShaderModule module, const void *allocator)) \
    F(CreatePipelineLayout, vk_Result, \
      (vk_Device device, const vk_PipelineLayoutCreateInfo *info, const void *allocator, vk_PipelineLayout *out)) \
    F(DestroyPipelineLayout, void, (vk_Device device, vk_PipelineLayout layout, const void *allocator)) \
    F(CreateComputePipelines, vk_Result, \
      (vk_Device device, uint64_t cache, uint32_t n, const vk_ComputePipelineCreateInfo *infos, const void *allocator, \
       vk_Pipeline *out)) \
    F(DestroyPipeline, void, (vk_Device device, vk_Pipeline pipeline, const void *allocator)) \
    F(CreateCommandPool, vk_Result, \
      (vk_Device device, const vk_CommandPoolCreateInfo *info, const void *allocator, vk_CommandPool *out)) \
    F(DestroyCommandPool, void, (vk_Device device, vk_CommandPool pool, const void *allocator)) \
    F(AllocateCommandBuffers, vk_Result, \
      (vk_Device device, const vk_CommandBufferAllocateInfo *info, vk_CommandBuffer *out)) \
    F(FreeCommandBuffers, void, \
      (vk_Device device, vk_CommandPool pool, uint32_t n, const vk_CommandBuffer *lists)) \
    F(BeginCommandBuffer, vk_Result, (vk_CommandBuffer commands, const vk_CommandBufferBeginInfo *info)) \
    F(EndCommandBuffer, vk_Result, (vk_CommandBuffer commands)) \
    F(CmdBindPipeline, void, (vk_CommandBuffer commands, int32_t point, vk_Pipeline pipeline)) \
    F(CmdPushConstants, void, \
      (vk_CommandBuffer commands, vk_PipelineLayout layout, uint32_t stages, uint32_t offset, uint32_t size, \
       const void *values)) \
    F(CmdDispatch, void, (vk_CommandBuffer commands, uint32_t x, uint32_t y, uint32_t z)) \
    F(CmdCopyBuffer, void, \
      (vk_CommandBuffer commands, vk_Buffer from, vk_Buffer to, uint32_t n, const vk_BufferCopy *regions)) \
    F(CmdPipelineBarrier, void, \
      (vk_CommandBuffer commands, uint32_t from, uint32_t to, uint32_t flags, uint32_t n_memory, \
       const vk_MemoryBarrier *memory, uint32_t n_buffer, const void *buffers, uint32_t n_image, const void *images)) \
    F(CreateQueryPool, vk_Result, \
      (vk_Device device, const vk_QueryPoolCreateInfo *info, const void *allocator, vk_QueryPool *out)) \
    F(DestroyQueryPool, void, (vk_Device device, vk_QueryPool pool, const void *allocator)) \
    F(GetQueryPoolResults, vk_Result, \
      (vk_Device device, vk_QueryPool pool, uint32_t first, uint32_t n, size_t bytes, void *out, uint64_t stride, \
       uint32_t flags)) \
    F(CmdResetQueryPool, void, (vk_CommandBuffer commands, vk_QueryPool pool, uint32_t first, uint32_t n)) \
    F(CmdWriteTimestamp, void, (vk_CommandBuffer commands, uint32_t stage, vk_QueryPool pool, uint32_t query)) \
    F(CreateFence, vk_Result, (vk_Device device, const vk_FenceCreateInfo *info, const void *allocator, vk_Fence *out)) \
    F(DestroyFence, void, (vk_Device device, vk_Fence fence, const void *allocator)) \
    F(ResetFences, vk_Result, (vk_Device device, uint32_t n, const vk_Fence *fences)) \
    F(GetFenceStatus, vk_Result, (vk_Device device, vk_Fence fence)) \
    F(CreateSemaphore, vk_Result, \
      (vk_Device device, const vk_SemaphoreCreateInfo *info, const void *allocator, vk_Semaphore *out)) \
    F(DestroySemaphore, void, (vk_Device device, vk_Semaphore semaphore, const void *allocator)) \
    F(GetSemaphoreCounterValue, vk_Result, (vk_Device device, vk_Semaphore semaphore, uint64_t *out)) \
    F(WaitSemaphores, vk_Result, (vk_Device device, const vk_SemaphoreWaitInfo *info, uint64_t ns)) \
    F(WaitForFences, vk_Result, (vk_Device device, uint32_t n, const vk_Fence *fences, uint32_t all, uint64_t ns)) \
    F(QueueSubmit, vk_Result, (vk_Queue queue, uint32_t n, const vk_SubmitInfo *infos, vk_Fence fence))
/* clang-format on */

/* The functions of an instance and of its device, by name. */
typedef struct vk_functions {
#define VK_MEMBER(name, result, arguments) result(VK_CALL *name) arguments;
    VK_INSTANCE_FUNCTIONS(VK_MEMBER)
    VK_DEVICE_FUNCTIONS(VK_MEMBER)
#undef VK_MEMBER
} vk_functions;
