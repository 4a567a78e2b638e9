// reduce.glsl: sums and maxima over a workgroup of THREADS, a power of two.
const uint THREADS = 128;
shared float reduce_room[THREADS];

#define REDUCE(name, join)                                                                  \
    float name(float value) {                                                               \
        const uint i = gl_LocalInvocationIndex;                                             \
        barrier();                                                                          \
        reduce_room[i] = value;                                                             \
        barrier();                                                                          \
        for (uint half_way = THREADS / 2; half_way > 0; half_way /= 2) {                    \
            if (i < half_way) {                                                             \
                const float a = reduce_room[i], b = reduce_room[i + half_way];              \
                reduce_room[i] = join;                                                      \
            }                                                                               \
            barrier();                                                                      \
        }                                                                                   \
        return reduce_room[0];                                                              \
    }
REDUCE(group_sum, a + b)
REDUCE(group_max, max(a, b))
