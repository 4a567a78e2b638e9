#include "gguf/types.h"

#include "quant/quant.h"

static const ds_gguf_tensor_type OTHERS[] = {
#define DS_GGUF_TENSOR_TYPE(name, id, elements, bytes) {name, id, elements, bytes},
#include "gguf/types.def"
#undef DS_GGUF_TENSOR_TYPE
};

bool ds_gguf_tensor_type_get(uint32_t gguf_type, ds_gguf_tensor_type *out) {
    ds_format format = ds_format_from_gguf(gguf_type);
    if (format != DS_FORMAT_COUNT) {
        const ds_format_info *info = ds_format_get(format);
        *out = (ds_gguf_tensor_type){info->name, gguf_type, info->block_elements, info->block_bytes};
        return true;
    }
    for (size_t i = 0; i < sizeof OTHERS / sizeof *OTHERS; i++) {
        if (OTHERS[i].gguf_type == gguf_type) {
            *out = OTHERS[i];
            return true;
        }
    }
    return false;
}
