/* shaders.h: the shaders compiled into this build (vulkan.cmake), in a table that the build makes. */
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct ds_shader {
    const char *name;
    const uint32_t *code;
    size_t bytes;
} ds_shader;

extern const ds_shader DS_SHADERS[]; /* the last has no name; all of them where there was no compiler */
