/* product.glsl: a product y = x W^T as its shaders are told of it (ds_gpu_product in product.h, the same bytes), and
 * the memory that it reaches, all by address: no descriptor, no limit to a tensor's size but the device's memory. */

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int16 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_16bit_storage : require

/* Slots [first, first + count) are multiplied by the block at w. */
struct Group {
    uint64_t w;
    uint first, count;
};

layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Dwords { uint v[]; };
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Quads { uvec4 v[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Floats { float v[]; };
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Vectors { vec4 v[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) buffer Results { float v[]; };
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Groups { Group v[]; };

layout(push_constant, scalar) uniform Product {
    uint64_t w;        /* rows of block 0; groups tell otherwise */
    uint64_t x;        /* floats (.., ldx) */
    uint64_t y;        /* floats (.., ldy) */
    uint64_t groups;   /* 0, or Group[]: what block z is */
    uint64_t slot_row; /* 0, or uint[]: the row of x that a slot reads; else its own */
    uint64_t tables;   /* the grids of the codebook formats (tables.glsl) */
    uint64_t up;       /* of a gated product: the rows of block 0 of `up`, or its Group[] where there are groups */
    uint64_t x_scale;  /* of activations of 8 bits: floats (.., ldx / 32); x then is bytes (.., ldx) */
    uint64_t norm;     /* of x that is normalised on the way: the norm's weights (k) */
    uint64_t stride_w; /* bytes from block z's weights to z + 1's */
    uint stride_x, stride_y; /* floats from block z's to z + 1's */
    uint ldx, ldy;
    uint row_bytes, k, rows; /* of W: rows of k values */
    uint n_slots;      /* of each block where there are no groups */
    uint flags;
    uint usual;        /* for the grid alone */
    float eps;         /* of the norm */
} p;

const uint FLAG_ADD = 1u;  /* y += */
const uint FLAG_GATE = 2u; /* y = silu(y) * */
const uint FLAG_LANES = 256u; /* of mul_vec.comp: times the logarithm of its LANES */

/* A block: its weights and slots, or count 0 where it has none. */
struct Block {
    uint64_t w, up, x, y;
    uint first, count;
};

Block block_of(uint z) {
    Block b;
    if (p.groups != 0) {
        const Group g = Groups(p.groups).v[z];
        b.w = g.w;
        b.up = p.up == 0 ? uint64_t(0) : Groups(p.up).v[z].w;
        b.x = p.x;
        b.y = p.y;
        b.first = g.first;
        b.count = g.w == 0 ? 0u : g.count;
    } else {
        b.w = p.w + uint64_t(z) * p.stride_w;
        b.up = p.up + uint64_t(z) * p.stride_w;
        b.x = p.x + 4 * (uint64_t(z) * p.stride_x);
        b.y = p.y + 4 * (uint64_t(z) * p.stride_y);
        b.first = 0;
        b.count = p.n_slots;
    }
    return b;
}

/* In halves: values of a row, whole pairs of tiles of K; and the first of block z's tiles of N slots, groups being in the order
 * of their slots. */
uint whole_k(uint K) { return (p.k + 2 * K - 1) / (2 * K) * (2 * K); }
uint first_tile(Block b, uint z, uint N) { return p.groups == 0 ? z * ((p.n_slots + N - 1) / N) : b.first / N + z; }

uint64_t weight_row(uint64_t w, uint row) { return w + uint64_t(row) * p.row_bytes; }

/* The row of x that a slot reads. */
uint64_t slot_input(Block b, uint slot) {
    const uint row = p.slot_row == 0 ? slot : Dwords(p.slot_row).v[slot];
    return b.x + 4 * (uint64_t(row) * p.ldx);
}

/* Four floats; rows start at any multiple of 4 bytes, most at one of 16. */
vec4 load4(uint64_t at) {
    if ((uint(at) & 15u) == 0) return Vectors(at).v[0];
    Floats f = Floats(at);
    return vec4(f.v[0], f.v[1], f.v[2], f.v[3]);
}

float silu(float x) { return x / (1.0 + exp(-x)); }

void store(Block b, uint slot, uint row, float value) {
    Results y = Results(b.y + 4 * (uint64_t(slot) * p.ldy + row));
    if ((p.flags & FLAG_GATE) != 0) value *= silu(y.v[0]);
    if ((p.flags & FLAG_ADD) != 0) value += y.v[0];
    y.v[0] = value;
}
