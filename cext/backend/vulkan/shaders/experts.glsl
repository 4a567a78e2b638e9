// experts.glsl: where a layer's experts lie, and what products over them are told.
struct Expert { // 0s where it is not on this device
    uint64_t gate, up, down;
};
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Experts { Expert at[]; };
struct Group { // as ds_gpu_group
    uint64_t w;
    uint first, count;
};
layout(buffer_reference, scalar, buffer_reference_align = 8) buffer Groups { Group at[]; };
