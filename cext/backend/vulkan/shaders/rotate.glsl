// rotate.glsl: Walsh-Hadamard over blocks of the largest power of two in n of row[], its own inverse; THREADS of a workgroup.
void rotate_row(uint n) {
    const uint block = n & (~n + 1);
    barrier();
    for (uint half_way = 1; half_way < block; half_way *= 2) {
        for (uint i = gl_LocalInvocationIndex; i < n / 2; i += THREADS) {
            const uint a = i / half_way * 2 * half_way + i % half_way, b = a + half_way;
            const float u = row[a], v = row[b];
            row[a] = u + v;
            row[b] = u - v;
        }
        barrier();
    }
    for (uint i = gl_LocalInvocationIndex; i < n; i += THREADS) row[i] *= 1.0 / sqrt(float(block));
    barrier();
}
