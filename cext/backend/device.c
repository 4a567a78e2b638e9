/* device.c: the kinds of device. One more is a row and a folder. */
#include "backend/device.h"

#include <string.h>

#include "backend/backend.h"
#include "backend/cpu/cpu.h"
#include "backend/vulkan/vulkan.h"

static ds_status open_cpu(const ds_device *device, const ds_facts *facts, int number, ds_backend **out, ds_error *err) {
    return ds_cpu_backend_create(facts, number, device->n_threads, device->isa, number != 0, out, err);
}

static ds_status open_vulkan(const ds_device *device, const ds_facts *facts, int number, ds_backend **out,
                             ds_error *err) {
    if (number == 0) return ds_fail(err, DS_EINVAL, "device 0 is the processor");
    return ds_gpu_backend_create(facts, number, device, out, err);
}

static const struct {
    const char *name;
    ds_status (*open)(const ds_device *device, const ds_facts *facts, int number, ds_backend **out, ds_error *err);
} KINDS[] = {{"cpu", open_cpu}, {"vulkan", open_vulkan}};

ds_status ds_device_open(const ds_device *device, const ds_facts *facts, int number, ds_backend **out, ds_error *err) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        if (strcmp(KINDS[i].name, device->kind) == 0) return KINDS[i].open(device, facts, number, out, err);
    }
    ds_fail(err, DS_EINVAL, "device %d is of kind `%s`", number, device->kind);
    return ds_hint(err, "this build computes on devices of kinds cpu and vulkan");
}
