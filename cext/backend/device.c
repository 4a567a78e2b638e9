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

typedef struct device_kind {
    const char *name;
    bool copies; /* its weights, into memory of its own */
    ds_status (*open)(const ds_device *device, const ds_facts *facts, int number, ds_backend **out, ds_error *err);
} device_kind;

static const device_kind KINDS[] = {{"cpu", false, open_cpu}, {"vulkan", true, open_vulkan}};

static const device_kind *kind_of(const ds_device *device) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (strcmp(KINDS[i].name, device->kind) == 0) return &KINDS[i];
    return NULL;
}

bool ds_device_copies(const ds_device *device) {
    const device_kind *kind = kind_of(device);
    return kind && kind->copies;
}

ds_status ds_device_open(const ds_device *device, const ds_facts *facts, int number, ds_backend **out, ds_error *err) {
    const device_kind *kind = kind_of(device);
    if (kind) return kind->open(device, facts, number, out, err);
    ds_fail(err, DS_EINVAL, "device %d is of kind `%s`", number, device->kind);
    return ds_hint(err, "this build computes on devices of kinds cpu and vulkan");
}
