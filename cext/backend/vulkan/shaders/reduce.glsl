// reduce.glsl: sums and maxima over a workgroup of THREADS: of each subgroup, then of these.
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
const uint THREADS = 128;
shared float reduce_room[THREADS];

#define REDUCE(name, of_subgroup, join)                                      \
    float name(float value) {                                                \
        const float own = of_subgroup(value);                                \
        barrier();                                                           \
        if (subgroupElect()) reduce_room[gl_SubgroupID] = own;               \
        barrier();                                                           \
        float a = reduce_room[0];                                            \
        for (uint i = 1; i < gl_NumSubgroups; i++) {                         \
            const float b = reduce_room[i];                                  \
            a = join;                                                        \
        }                                                                    \
        return a;                                                            \
    }
REDUCE(group_sum, subgroupAdd, a + b)
REDUCE(group_max, subgroupMax, max(a, b))
