#include "backend/vulkan/product.h"

#include <string.h>

#include "quant/grids.h"

/* ---- What is told of devices: the one place for figures that suit a card. They change results by rounding alone.
 *
 * Chosen by counting registers, groups and operations: a product of few slots waits for memory, so that its threads are as
 * many as keep a large card's memory at work, as long as each has an item of its row left; a thread has up to four items
 * in turn, of floats eight, and two rows that share what is read of x where there are enough. Sums of more than 8 (rows
 * by slots) leave no registers for weights. A tile costs as much as its 64 slots whatever it holds, so that passes of 8
 * slots are cheaper up to half of them or so, and among experts, of which each has a few of the tokens, up to more; matrix
 * units make a tile's sums cheap. */
enum {
    VEC_THREADS = 256,
    VEC_FULL = 65536, /* threads that a card should have at least, */
    VEC_GROUPS = 1024, /* and workgroups that it need not have more than: each reads x for itself */
    VEC_BLOCKS = 8, /* experts that are counted on, however many come: sums are the same wherever they are */
    VEC_CHUNK = 2048, /* values of a row of x that a workgroup keeps: with more a compiler takes more registers; */
    VEC_KEPT = 4096, /* of all rows, at most */
    SUM_CHUNK = 2048, /* of a row of x */
    SUM_LANES = 64, /* threads to a row */
    MAT_THREADS = 128, /* mul_mat.comp is written for it */
    THREADS = 128, /* of the others */
    TILE = 64, /* rows, and slots, that a group of mul_mat.comp computes; slots of mul_coop.comp, of whose rows */
    LARGE_TILE = 128, /* these reuse more of what is read, */
    LARGE_FROM = 512, /* where groups of them still keep a large device at work */
    COOP_STEP = 40, /* halves of a row of mul_coop.comp's tiles, and bytes of the largest grid that it shares */
    COOP_GRID = 2048,
    GATHER_VALUES = 2048, /* of a row that a group of get_rows.comp decodes */
    VEC_MOST = 8, /* slots; more are tiles' work: of matrix units, */
    VEC_MOST_FLOATS = 32, /* without them, */
    VEC_MOST_GROUPS = 64, /* and where they are shared out among groups; */
    VEC_MOST_ROWS = 256, /* and of so few rows of floats any, */
    VEC_TILES =
        12, /* where they would be no more tiles: on an H200 114 us for 152 of 512 tokens, 216 for 148 of 1,024 */
    MAX_GROUPS = 65535, /* what every device has */
};

void ds_gpu_tables(uint16_t out[DS_GPU_TABLES_BYTES / 2]) {
#define PUT(grid) memcpy(out, grid, sizeof grid), out += sizeof grid / sizeof *grid
    PUT(ds_grid_iq2_xxs);
    PUT(ds_grid_iq2_xs);
    PUT(ds_grid_iq2_s);
    PUT(ds_grid_iq3_xxs);
    PUT(ds_grid_iq3_s);
#undef PUT
}

/* Not printf: it would be a third of what a step takes to tell. */
static void name_of(const char *family, ds_format format, char out[48]) {
    const char *parts[] = {family, format == DS_FORMAT_COUNT ? "" : "_",
                           format == DS_FORMAT_COUNT ? "" : ds_format_get(format)->name};
    size_t used = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        for (const char *c = parts[i]; *c && used < 47; c++) out[used++] = *c;
    out[used] = '\0';
}

/* The shader of a family for the format, or the family itself for DS_FORMAT_COUNT. */
static ds_status record(ds_gpu *gpu, ds_gpu_commands *c, const char *family, ds_format format, const uint32_t *specs,
                        int n_specs, const ds_gpu_product *p, const uint32_t grid[3], ds_error *err) {
    char name[48];
    vk_Pipeline pipeline;
    if (!grid[0] || !grid[1] || !grid[2]) return DS_OK; /* nothing to compute, which no grid can say */
    name_of(family, format, name);
    if (grid[0] > MAX_GROUPS || grid[1] > MAX_GROUPS || grid[2] > MAX_GROUPS)
        return ds_fail(err, DS_EINVAL, "%s: %u by %u by %u groups, a device takes %d", name, grid[0], grid[1], grid[2],
                       MAX_GROUPS);
    const ds_status st = ds_gpu_pipeline(gpu, name, specs, n_specs, &pipeline, err);
    if (st == DS_OK) ds_gpu_dispatch(gpu, c, pipeline, p, sizeof *p, grid[0], grid[1], grid[2]);
    return st;
}

bool ds_gpu_packs(const ds_gpu *gpu, ds_format format) {
    return ds_gpu_told(gpu)->int_dot && ds_format_get(format)->act == DS_ACT_Q8;
}

static const char *family(const ds_gpu_product *p, const char *floats, const char *packed) {
    return p->x_scale ? packed : floats;
}

/* Subgroups that a tile of mul_coop.comp is cut into by its rows: large ones into more, since registers bound how many
 * threads a processor has at work. */
static uint32_t tall_of(const ds_gpu_info *told, uint32_t tile) {
    return tile == LARGE_TILE && 8 * told->subgroup <= DS_GPU_WORKGROUP ? 4 : 2;
}

/* Bytes that a workgroup of mul_coop.comp shares: two units of rows and slots, a matrix of each subgroup, and the largest
 * grid where the format has one. */
static uint32_t coop_shared(const ds_gpu_info *told, ds_format format, uint32_t tile) {
    const bool grid = strncmp(ds_format_get(format)->name, "iq", 2) == 0;
    return 2 * (tile + TILE) * COOP_STEP * 2 + 2 * tall_of(told, tile) * told->coop[0] * told->coop[1] * 4 +
           (grid ? COOP_GRID : 0);
}

/* Halves serve where floats need not be kept: rows of floats are few. */
static bool takes_halves(const ds_gpu *gpu, ds_format format, const ds_gpu_product *p) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    if (!told->coop[0] || p->x_scale || format == DS_FORMAT_F32 || p->flags & DS_GPU_EXACT) return false;
    return coop_shared(told, format, TILE) <= told->shared_bytes;
}

/* Whether tiles are too few for a card: those of few rows of floats, a router's, whose slots others share out better. */
static bool has_few_tiles(ds_format format, const ds_gpu_product *p) {
    const uint64_t tiles = (uint64_t)ds_gpu_pieces(p->rows, TILE) * ds_gpu_pieces(p->n_slots, TILE);
    return format == DS_FORMAT_F32 && !p->groups && p->rows <= VEC_MOST_ROWS && tiles < VEC_TILES;
}

static bool is_vec(const ds_gpu *gpu, ds_format format, const ds_gpu_product *p) {
    const uint32_t most = takes_halves(gpu, format, p) ? VEC_MOST : p->groups ? VEC_MOST_GROUPS : VEC_MOST_FLOATS;
    return p->n_slots <= most || has_few_tiles(format, p);
}

/* How mul_vec.comp is cut: its specialization constants but for the threads, and lanes, a power of two. */
typedef struct shape {
    uint32_t rows, slots, lanes, chunk, aligned, joined;
} shape;

static bool is_float(ds_format format) { return ds_format_get(format)->block_elements == 1; }

static bool is_aligned(ds_format format, const ds_gpu_product *p) {
    const uint64_t x = p->x | p->norm | 4 * (uint64_t)(p->ldx | p->stride_x | p->k);
    const uint64_t w = p->groups ? 1 : p->w | p->up | p->stride_w | p->row_bytes;
    return (format == DS_FORMAT_F32 ? x | w : x) % 16 == 0;
}

/* Blocks that are counted on. */
static uint32_t blocks_of(const ds_gpu_product *p, uint32_t n_blocks) { return p->groups ? VEC_BLOCKS : n_blocks; }

static shape shape_of(ds_format format, const ds_gpu_product *p, uint32_t n_matrices, uint32_t n_blocks) {
    const uint32_t item = is_float(format) ? 4 : 32, items = ds_gpu_pieces(p->k, item),
                   each = is_float(format) ? 8 : 4; /* of a thread */
    const uint64_t rows = (uint64_t)p->rows * blocks_of(p, n_blocks);
    shape s = {.rows = 1, .slots = 8, .lanes = 1};
    s.aligned = is_aligned(format, p);
    s.joined = p->flags / DS_GPU_JOIN;
    const uint32_t slots = p->groups && p->usual && 2 * p->usual < p->n_slots ? 2 * p->usual : p->n_slots;
    while (s.slots > 1 && s.slots / 2 >= slots) s.slots /= 2;
    s.chunk = s.joined ? DS_GPU_JOIN_VALUES : s.slots * VEC_CHUNK > VEC_KEPT ? VEC_KEPT / s.slots : VEC_CHUNK;
    const uint32_t most = s.chunk / item < VEC_THREADS ? s.chunk / item : VEC_THREADS;
    while (s.lanes < items && s.lanes < most && (items > each * s.lanes || rows * s.lanes < VEC_FULL)) s.lanes *= 2;
    if (n_matrices == 1 && s.slots <= 4 && s.lanes > 1 && rows * s.lanes >= 2 * VEC_FULL) s.rows = 2;
    return s;
}

static ds_status mul_vec(ds_gpu *gpu, ds_gpu_commands *c, const char *name, ds_format format, const ds_gpu_product *p,
                         uint32_t n_matrices, uint32_t n_blocks, ds_error *err) {
    const shape s = shape_of(format, p, n_matrices, n_blocks);
    const uint32_t specs[] = {VEC_THREADS, s.rows, s.slots, s.chunk, s.aligned, s.joined};
    ds_gpu_product cut = *p;
    const uint32_t groups = ds_gpu_pieces(p->rows, VEC_THREADS / s.lanes * s.rows),
                   slots = ds_gpu_pieces(p->n_slots, s.slots);
    const uint64_t passes = ((uint64_t)groups * slots * blocks_of(p, n_blocks) + VEC_GROUPS - 1) / VEC_GROUPS;
    for (uint32_t lanes = s.lanes; lanes > 1; lanes /= 2) cut.flags += DS_GPU_LANES;
    return record(gpu, c, name, format, specs, 6, &cut,
                  (uint32_t[]){passes < groups ? ds_gpu_pieces(groups, (uint32_t)passes) : 1, slots, n_blocks}, err);
}

/* Tiles of slots in a grid: a block with more than is usual takes its own one after another, so that the others, of which
 * most have few, need not start as many groups for nothing. */
static uint32_t slot_tiles(const ds_gpu_product *p) {
    const uint32_t all = ds_gpu_pieces(p->n_slots, TILE), usual = ds_gpu_pieces(2 * p->usual, TILE);
    return p->usual && usual < all ? usual : all;
}

static ds_status mul_mat(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, uint32_t n_blocks,
                         ds_error *err) {
    return record(gpu, c, family(p, "mul_mat", "dot_mat"), format, (uint32_t[]){MAT_THREADS}, 1, p,
                  (uint32_t[]){ds_gpu_pieces(p->rows, TILE), slot_tiles(p), n_blocks}, err);
}

/* matrices: W alone, or W and Up in one tile. */
static ds_status mul_coop(ds_gpu *gpu, ds_gpu_commands *c, uint32_t matrices, ds_format format, const ds_gpu_product *p,
                          uint32_t n_blocks, ds_error *err) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    const uint32_t slots = slot_tiles(p);
    const uint64_t large = (uint64_t)ds_gpu_pieces(matrices * p->rows, LARGE_TILE) * slots * n_blocks;
    const bool fits = coop_shared(told, format, LARGE_TILE) <= told->shared_bytes;
    const uint32_t tile = fits && large >= LARGE_FROM ? LARGE_TILE : TILE, tall = tall_of(told, tile);
    const uint32_t threads = 2 * tall * told->subgroup;
    const uint32_t specs[] = {threads, told->coop[0], told->coop[1],         told->coop[2],
                              tile,    threads,       is_aligned(format, p), tall};
    return record(gpu, c, matrices == 2 ? "gated_coop" : "mul_coop", format, specs, 8, p,
                  (uint32_t[]){ds_gpu_pieces(p->rows, tile / matrices), slots, n_blocks}, err);
}

/* Whether a quarter of the least tile, what a subgroup has of either, is whole matrices. */
static bool has_gated_coop(const ds_gpu *gpu) { return TILE / 4 % ds_gpu_told(gpu)->coop[0] == 0; }

ds_status ds_gpu_mul(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, uint32_t n_blocks,
                     ds_error *err) {
    if (is_vec(gpu, format, p)) return mul_vec(gpu, c, family(p, "mul_vec", "dot_vec"), format, p, 1, n_blocks, err);
    if (takes_halves(gpu, format, p)) return mul_coop(gpu, c, 1, format, p, n_blocks, err);
    return mul_mat(gpu, c, format, p, n_blocks, err);
}

ds_status ds_gpu_mul_gated(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, ds_format up_format,
                           uint32_t up_row_bytes, const ds_gpu_product *p, uint32_t n_blocks, ds_error *err) {
    const bool alike = format == up_format && up_row_bytes == p->row_bytes;
    if (alike && is_vec(gpu, format, p))
        return mul_vec(gpu, c, family(p, "mul_gated", "dot_gated"), format, p, 2, n_blocks, err);
    if (alike && takes_halves(gpu, format, p) && has_gated_coop(gpu))
        return mul_coop(gpu, c, 2, format, p, n_blocks, err);
    ds_gpu_product up = *p;
    up.row_bytes = up_row_bytes;
    up.flags |= DS_GPU_GATE;
    if (p->groups) up.groups = p->up;
    else up.w = p->up;
    const ds_status st = ds_gpu_mul(gpu, c, format, p, n_blocks, err);
    if (st != DS_OK) return st;
    ds_gpu_barrier(gpu, c);
    return ds_gpu_mul(gpu, c, up_format, &up, n_blocks, err);
}

ds_status ds_gpu_mul_sum(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, uint32_t n_blocks,
                         uint64_t weights, uint64_t others, ds_error *err) {
    const uint32_t item = is_float(format) ? 4 : 32, items = ds_gpu_pieces(p->k, item);
    const uint32_t chunk = p->k < SUM_CHUNK ? ds_gpu_pieces(p->k, 256) * 256 : SUM_CHUNK;
    ds_gpu_product sum = *p;
    uint32_t lanes = 1;
    while (lanes < items && lanes < SUM_LANES) lanes *= 2;
    sum.up = weights, sum.x_scale = others, sum.n_slots = n_blocks;
    return record(gpu, c, "mul_sum", format, (uint32_t[]){VEC_THREADS, lanes, chunk, is_aligned(format, p)}, 4, &sum,
                  (uint32_t[]){ds_gpu_pieces(p->rows, VEC_THREADS / lanes), n_blocks != 0, 1}, err);
}

ds_status ds_gpu_pack(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_product *p, ds_error *err) {
    return record(gpu, c, "pack_q8", DS_FORMAT_COUNT, (uint32_t[]){THREADS}, 1, p,
                  (uint32_t[]){ds_gpu_pieces(p->ldx, 4 * THREADS), p->n_slots, 1}, err);
}

ds_status ds_gpu_rows(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, ds_error *err) {
    return record(gpu, c, "get_rows", format, (uint32_t[]){THREADS}, 1, p,
                  (uint32_t[]){ds_gpu_pieces(p->k, GATHER_VALUES), p->n_slots, 1}, err);
}
