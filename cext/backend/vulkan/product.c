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
    TILE = 64, /* rows, and slots, that a group of mul_mat.comp computes, and one of mul_coop.comp; */
    LARGE_TILE = 128, /* so many rows reuse more of what is read, */
    LARGE_FROM = 512, /* where groups of them still keep a large device at work */
    HALVES_THREADS = 256, /* of what makes halves of weights and activations, */
    HALVES_VALUES = 256, /* values of a row that a group of it takes */
    GATHER_VALUES = 2048, /* of a row that a group of get_rows.comp decodes */
    VEC_MOST = 8, /* slots; more are tiles' work: of matrix units, */
    VEC_MOST_FLOATS = 32, /* without them, */
    VEC_MOST_GROUPS = 64, /* and where they are shared out among groups; */
    VEC_MOST_USUAL = 2, /* of a group, where there are matrix units, which read all of its weights twice more; */
    FEW_ROWS = 256, /* rows of floats at most that are taken as few, a router's: */
    FEW_TILE = 64, /* of a group of mul_few.comp, */
    FEW_SLOTS = 4, /* and its slots */
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

/* ---- Halves: how many bytes they take ---- */

static uint32_t whole_k(const ds_gpu_info *told, uint32_t k) { return ds_gpu_whole(k, 2 * told->coop[2]); }

static uint64_t weights_bytes(const ds_gpu_info *told, uint32_t rows, uint32_t k) {
    return (uint64_t)ds_gpu_whole(rows, told->coop[0]) * whole_k(told, k) * 2;
}

uint64_t ds_gpu_halved_weights(const ds_gpu *gpu, uint32_t rows, uint32_t k) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    return told->coop[0] ? weights_bytes(told, rows, k) : 0;
}

uint64_t ds_gpu_halved_rows(const ds_gpu *gpu, uint64_t n_slots, uint64_t n_blocks, uint32_t k) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    return told->coop[0] ? (n_slots / told->coop[1] + n_blocks) * told->coop[1] * whole_k(told, k) * 2 : 0;
}

/* Whether matrices of these rows, a block or a part of its rows at a time, find room: half of it is written while the other
 * is read. */
static bool find_room(const ds_gpu *gpu, const ds_gpu_halves *h, const ds_gpu_product *p, uint32_t matrices) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    const uint32_t rows = p->groups || p->rows < LARGE_TILE ? p->rows : LARGE_TILE;
    return h && matrices * weights_bytes(told, rows, p->k) <= h->w_bytes / 2;
}

/* Halves serve where floats need not be kept: rows of floats are few. */
static bool takes_halves(const ds_gpu *gpu, const ds_gpu_halves *h, ds_format format, const ds_gpu_product *p,
                         uint32_t matrices) {
    if (!ds_gpu_told(gpu)->coop[0] || p->x_scale || format == DS_FORMAT_F32 || p->flags & DS_GPU_EXACT) return false;
    return find_room(gpu, h, p, matrices);
}

/* Whether they are few rows of floats for many slots, of which tiles would be too few for a card. */
static bool is_few(ds_format format, const ds_gpu_product *p) {
    return format == DS_FORMAT_F32 && !p->groups && !p->norm && !p->slot_row && p->rows <= FEW_ROWS;
}

static bool is_vec(ds_format format, const ds_gpu_product *p, bool halves) {
    const uint32_t most = halves ? VEC_MOST : p->groups ? VEC_MOST_GROUPS : VEC_MOST_FLOATS;
    const bool few = halves && p->groups && p->usual && p->usual <= VEC_MOST_USUAL;
    return p->n_slots <= most || few;
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
static uint32_t slot_tiles(const ds_gpu_product *p, uint32_t of) {
    const uint32_t all = ds_gpu_pieces(p->n_slots, of), usual = ds_gpu_pieces(2 * p->usual, of);
    return p->usual && usual < all ? usual : all;
}

static ds_status mul_mat(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, uint32_t n_blocks,
                         ds_error *err) {
    return record(gpu, c, family(p, "mul_mat", "dot_mat"), format, (uint32_t[]){MAT_THREADS}, 1, p,
                  (uint32_t[]){ds_gpu_pieces(p->rows, TILE), slot_tiles(p, TILE), n_blocks}, err);
}

static ds_status mul_few(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_product *p, uint32_t n_blocks, ds_error *err) {
    return record(gpu, c, "mul_few", DS_FORMAT_COUNT, (uint32_t[]){VEC_THREADS, is_aligned(DS_FORMAT_F32, p)}, 2, p,
                  (uint32_t[]){ds_gpu_pieces(p->rows, FEW_TILE), ds_gpu_pieces(p->n_slots, FEW_SLOTS), n_blocks}, err);
}

/* ---- Matrix units ---- */

/* W, or W and Up, of a product in halves. */
typedef struct factors {
    uint32_t n;
    ds_format format[2];
    uint32_t row_bytes[2];
} factors;

/* What is multiplied at once: blocks, or rows of one. */
typedef struct piece {
    uint32_t block, n_blocks, row, n_rows;
} piece;

static piece next_piece(const ds_gpu_info *told, const ds_gpu_halves *h, const ds_gpu_product *p, uint32_t n,
                        uint32_t n_blocks, piece was) {
    const uint64_t room = h->w_bytes / 2, block = n * weights_bytes(told, p->rows, p->k);
    piece next = {was.block + was.n_blocks, 1, 0, p->rows};
    if (block <= room) { /* pieces about alike */
        const uint32_t pieces = ds_gpu_pieces(n_blocks, (uint32_t)(room / block < n_blocks ? room / block : n_blocks)),
                       each = ds_gpu_pieces(n_blocks, pieces);
        next.n_blocks = each < n_blocks - next.block ? each : n_blocks - next.block;
        return next;
    }
    const uint32_t most = (uint32_t)(room / (n * weights_bytes(told, LARGE_TILE, p->k))) * LARGE_TILE;
    next.row = was.n_rows && was.row + was.n_rows < p->rows ? was.row + was.n_rows : 0;
    next.block = next.row ? was.block : was.n_rows ? was.block + 1 : 0;
    next.n_rows = p->rows - next.row < most ? p->rows - next.row : most;
    return next;
}

static uint64_t at_group(uint64_t groups, uint32_t block) {
    return groups ? groups + (uint64_t)block * sizeof(ds_gpu_group) : 0;
}

static ds_status halve_weights(ds_gpu *gpu, ds_gpu_commands *c, const factors *f, const ds_gpu_product *p, piece at,
                               uint64_t to, ds_error *err) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    ds_status st = DS_OK;
    for (uint32_t i = 0; i < f->n && st == DS_OK; i++) {
        ds_gpu_product cut = *p;
        cut.y = to;
        cut.rows = at.n_rows;
        cut.row_bytes = f->row_bytes[i];
        if (p->groups) cut.groups = at_group(i ? p->up : p->groups, at.block);
        else cut.w = (i ? p->up : p->w) + at.block * p->stride_w + (uint64_t)at.row * f->row_bytes[i];
        const uint32_t specs[] = {HALVES_THREADS, told->coop[0], told->coop[2], f->n, i};
        st = record(gpu, c, "halves", f->format[i], specs, 5, &cut,
                    (uint32_t[]){ds_gpu_pieces(whole_k(told, p->k), HALVES_VALUES),
                                 ds_gpu_pieces(at.n_rows, told->coop[0]), at.n_blocks},
                    err);
    }
    return st;
}

static ds_status halve_rows(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_product *p, uint32_t n_blocks, uint64_t to,
                            ds_error *err) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    ds_gpu_product cut = *p;
    cut.y = to;
    const uint32_t specs[] = {HALVES_THREADS, told->coop[1], told->coop[2], is_aligned(DS_FORMAT_F16, p)};
    return record(
        gpu, c, "halve_rows", DS_FORMAT_COUNT, specs, 4, &cut,
        (uint32_t[]){ds_gpu_pieces(whole_k(told, p->k), HALVES_VALUES), slot_tiles(p, told->coop[1]), n_blocks}, err);
}

static ds_status mul_halves(ds_gpu *gpu, ds_gpu_commands *c, uint32_t n, const ds_gpu_product *p, piece at,
                            uint32_t tile, uint64_t w, uint64_t x, ds_error *err) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    ds_gpu_product cut = *p;
    cut.w = w;
    cut.x = x + at.block * (p->groups ? 1 : (uint64_t)ds_gpu_pieces(p->n_slots, told->coop[1])) * told->coop[1] *
                    whole_k(told, p->k) * 2;
    cut.y = p->y + 4 * ((uint64_t)at.block * p->stride_y + at.row);
    cut.groups = at_group(p->groups, at.block);
    cut.stride_w = n * weights_bytes(told, at.n_rows, p->k);
    cut.rows = at.n_rows;
    const uint32_t specs[] = {4 * told->subgroup, told->coop[0], told->coop[1], told->coop[2], tile};
    return record(gpu, c, n == 2 ? "gated_coop" : "mul_coop", DS_FORMAT_COUNT, specs, 5, &cut,
                  (uint32_t[]){ds_gpu_pieces(at.n_rows, tile / n), slot_tiles(p, TILE), at.n_blocks}, err);
}

/* Piece by piece, the next one's weights beside the products of this one. */
static ds_status mul_coop(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_halves *h, const factors *f,
                          const ds_gpu_product *p, uint32_t n_blocks, ds_error *err) {
    const ds_gpu_info *told = ds_gpu_told(gpu);
    const uint64_t large = (uint64_t)ds_gpu_pieces(f->n * p->rows, LARGE_TILE) * slot_tiles(p, TILE) * n_blocks;
    const uint32_t tile = large >= LARGE_FROM ? LARGE_TILE : TILE;
    piece now = next_piece(told, h, p, f->n, n_blocks, (piece){0});
    ds_gpu_barrier(gpu, c); /* what came before may read the room still */
    ds_status st = halve_rows(gpu, c, p, n_blocks, h->x, err);
    if (st == DS_OK) st = halve_weights(gpu, c, f, p, now, h->w, err);
    for (uint32_t turn = 0; now.block < n_blocks && st == DS_OK; turn = 1 - turn) {
        const piece next = next_piece(told, h, p, f->n, n_blocks, now);
        ds_gpu_barrier(gpu, c);
        st = mul_halves(gpu, c, f->n, p, now, tile, h->w + turn * (h->w_bytes / 2), h->x, err);
        if (st == DS_OK && next.block < n_blocks)
            st = halve_weights(gpu, c, f, p, next, h->w + (1 - turn) * (h->w_bytes / 2), err);
        now = next;
    }
    return st;
}

ds_status ds_gpu_mul(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_halves *h, ds_format format, const ds_gpu_product *p,
                     uint32_t n_blocks, ds_error *err) {
    const bool halves = takes_halves(gpu, h, format, p, 1);
    if (is_vec(format, p, halves)) return mul_vec(gpu, c, family(p, "mul_vec", "dot_vec"), format, p, 1, n_blocks, err);
    if (is_few(format, p)) return mul_few(gpu, c, p, n_blocks, err);
    if (!halves) return mul_mat(gpu, c, format, p, n_blocks, err);
    return mul_coop(gpu, c, h, &(factors){1, {format}, {p->row_bytes}}, p, n_blocks, err);
}

ds_status ds_gpu_mul_gated(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_halves *h, ds_format format,
                           ds_format up_format, uint32_t up_row_bytes, const ds_gpu_product *p, uint32_t n_blocks,
                           ds_error *err) {
    const bool alike = format == up_format && up_row_bytes == p->row_bytes;
    const bool halves = takes_halves(gpu, h, format, p, 2) && takes_halves(gpu, h, up_format, p, 2);
    const bool vec = is_vec(format, p, halves);
    if (alike && vec) return mul_vec(gpu, c, family(p, "mul_gated", "dot_gated"), format, p, 2, n_blocks, err);
    if (halves && !vec && (alike || p->groups || n_blocks == 1))
        return mul_coop(gpu, c, h, &(factors){2, {format, up_format}, {p->row_bytes, up_row_bytes}}, p, n_blocks, err);
    ds_gpu_product up = *p;
    up.row_bytes = up_row_bytes;
    up.flags |= DS_GPU_GATE;
    if (p->groups) up.groups = p->up;
    else up.w = p->up;
    const ds_status st = ds_gpu_mul(gpu, c, h, format, p, n_blocks, err);
    if (st != DS_OK) return st;
    ds_gpu_barrier(gpu, c);
    return ds_gpu_mul(gpu, c, h, up_format, &up, n_blocks, err);
}

ds_status ds_gpu_mul_sum(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, uint32_t n_blocks,
                         uint64_t weights, uint64_t others, ds_error *err) {
    const uint32_t item = is_float(format) ? 4 : 32, items = ds_gpu_pieces(p->k, item);
    const uint32_t chunk = p->k < SUM_CHUNK ? ds_gpu_whole(p->k, 256) : SUM_CHUNK;
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

ds_status ds_gpu_transpose(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p,
                           uint32_t n_blocks, ds_error *err) {
    return record(gpu, c, "transpose", format, (uint32_t[]){THREADS}, 1, p,
                  (uint32_t[]){ds_gpu_pieces(p->rows, THREADS), 2 * ds_gpu_pieces(p->k, 32), n_blocks}, err);
}
