/* factors.glsl: what a product multiplies, sixteen values at a time: decoded weights by floats, or with DOT codes by
 * activations of 8 bits (pack_q8.comp), whose integer products are those of the processor's kernels. Behind
 * unpack.glsl. */

#if defined(DOT)

#extension GL_EXT_spirv_intrinsics : require

/* OpSDotKHR of four signed bytes each. */
spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6019, 6018], id = 4450)
int dot_packed(int a, int b, spirv_literal int form);

int dot_bytes(uvec4 a, uvec4 b) {
    return dot_packed(int(a.x), int(b.x), 0) + dot_packed(int(a.y), int(b.y), 0) +
           dot_packed(int(a.z), int(b.z), 0) + dot_packed(int(a.w), int(b.w), 0);
}

#define Weights Codes

struct Inputs {
    uvec4 q;
    float scale;
#if HAS_LOW
    float sum; /* scale times that of q */
#endif
};

Weights weights_of(uint64_t row, uint u, uint h, uint k) { return unpack(row, u, h); }

/* The row of packed activations that a slot reads: as many bytes as x has floats. */
uint64_t input_row(Block b, uint slot) { return (slot_input(b, slot) - p.x) / 4; }

Inputs inputs_of(uint64_t row, uint u, uint h, uint k) {
    Inputs x;
    const uint64_t at = row + place(u, h);
    x.q = Quads(p.x + at).v[0];
    x.scale = Floats(p.x_scale + at / 32 * 4).v[0];
#if HAS_LOW
    x.sum = x.scale * float(dot_bytes(x.q, uvec4(0x01010101u)));
#endif
    return x;
}

float multiply(Weights w, Inputs x) {
    const float product = x.scale * w.scale * float(dot_bytes(w.q, x.q));
#if HAS_LOW
    return product - w.low * x.sum;
#else
    return product;
#endif
}

#else

struct Weights {
    vec4 v[4];
};
#define Inputs Weights

Weights weights_of(uint64_t row, uint u, uint h, uint k) {
    Weights w;
    decode(row, u, h, k, w.v);
    return w;
}

uint64_t input_row(Block b, uint slot) { return slot_input(b, slot); }

Inputs inputs_of(uint64_t row, uint u, uint h, uint k) {
    Inputs x;
    activations(row, u, h, k, x.v);
    return x;
}

float multiply(Weights w, Inputs x) {
    return dot(w.v[0], x.v[0]) + dot(w.v[1], x.v[1]) + (dot(w.v[2], x.v[2]) + dot(w.v[3], x.v[3]));
}

#endif
