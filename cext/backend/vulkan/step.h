/* step.h: a model's steps on a GPU, as the files of this backend see them. Each operation (backend.h) is recorded into one
 * list of commands, which runs when all of a submission are; what the host takes from it is copied behind the wait. */
#pragma once

#include "backend/backend.h"
#include "backend/vulkan/ahead.h"
#include "backend/vulkan/cache.h"
#include "backend/vulkan/hot.h"
#include "backend/vulkan/product.h"
#include "backend/vulkan/weights.h"

enum {
    DS_GPU_STEPS = 2, /* the whole, its tail */
    DS_GPU_ATTEND_TOKENS = 128, /* whose attention is computed together: bounds what lies between; */
    DS_GPU_ATTEND_ROWS = 8192, /* with matrix units so many heads of tokens, where they are more */
    DS_GPU_ATTEND_MANY = 16, /* tokens of a sequence whose attention is worth matrix units */
    DS_GPU_ATTEND_GROUPS = 256, /* workgroups that few tokens' positions are shared out among */
    DS_GPU_ATTEND_HEADS = 8, /* of a workgroup: as latent_attend.comp has it */
    DS_GPU_ATTEND_FEW = 8, /* tokens at most that latent_few.comp takes, */
    DS_GPU_FEW_WIDTH = 640, /* values of a query that it holds, */
    DS_GPU_FEW_VALUES = 512, /* of a position that its groups take at a time, */
    DS_GPU_FEW_GROUPS = 128, /* and how many of these positions are shared out among, about what a card runs at once */
    DS_GPU_HALVES = 256 << 20, /* bytes at least that there may be of weights as halves, for products by matrix units */
    DS_GPU_LOGIT_ROWS = 64, /* rows of logits that are computed together */
    DS_GPU_MAX_ROW = 4608, /* values of a row of the cache, padded: as rows.glsl has it */
    DS_GPU_MAX_EXPERTS = 1024, /* as route.comp and plan.comp have it */
    DS_GPU_THREADS = 128, /* of a workgroup of the backend's own shaders */
};

/* A piece of a buffer, as the device and as the host sees it. */
typedef struct ds_gpu_span {
    uint64_t at; /* address */
    unsigned char *host; /* or NULL */
} ds_gpu_span;

/* As rows.glsl has it. */
typedef struct ds_gpu_token {
    uint64_t blocks;
    uint32_t pos;
    float scale;
} ds_gpu_token;

/* The memory of a step, carved from three buffers. */
typedef struct ds_gpu_room {
    int n_tok; /* what it was sized for */
    ds_gpu_buffer own, halved, in, out, table; /* table: grows with the caches */
    ds_gpu_halves halves;
    /* Of the device's own, floats but where said. */
    uint64_t x[DS_GPU_STEPS], xn, kv_a, q_a, q, absorbed, queries, parts, latent,
        heads; /* attention's: of ds_gpu_attend_together tokens */
    uint64_t router, ids, weights, groups, slot_row, slot_of, hidden, hidden_exps, rows, shared;
    /* The host writes. */
    ds_gpu_span tokens[DS_GPU_STEPS], angles[DS_GPU_STEPS], taken, logit_rows, x_in, input_in, split_groups, split_row,
        split_of, others, taken_experts; /* of layers that ahead.h takes whole, where they lie */
    /* The host reads. */
    ds_gpu_span cached, chosen, x_out, input_out, rows_out, logits;
    uint64_t cached_bytes; /* of a layer's rows */
} ds_gpu_room;

typedef struct ds_gpu_backend {
    ds_backend head;
    ds_facts facts;
    int number;
    ds_gpu *gpu;
    ds_gpu_weights w;
    ds_ahead *ahead; /* or NULL */
    bool behind; /* what was submitted last runs behind copies */
    int n_cuts; /* lists of the run under way that others follow, and that nobody waited for */
    uint64_t last_cut; /* the number of the last of them */
    ds_gpu_hot hot;
    ds_gpu_cache caches[DS_KV_TYPES];
    bool cached[DS_KV_TYPES]; /* the cache of that type was made */
    int attend_begin, attend_end; /* layers whose attention this computes lie in here */
    ds_gpu_room room;
    ds_gpu_commands commands; /* a list for each submission of a step */
    int n_submitted; /* of this step */
    const ds_request *requests[DS_GPU_STEPS];
    uint64_t table_used; /* bytes of the table, by this step */
    const ds_op *ops;
    int n_ops;
    uint64_t record_ns; /* that recording and submitting took, since it was watched */
} ds_gpu_backend;

/* Tokens of a step of n_tok whose attention is computed together at most. */
int ds_gpu_attend_together(const ds_gpu_backend *b, int n_tok);
/* Rows of queries, of each part of their positions, that the room has at least: what all workgroups hold. */
int ds_gpu_part_rows(const ds_gpu_backend *b);
/* Room for steps of n_tok tokens; keeps what is large enough. */
ds_status ds_gpu_room_reserve(ds_gpu_backend *b, int n_tok, ds_error *err);
void ds_gpu_room_release(ds_gpu_backend *b);
/* Bytes from room.absorbed on that attention of n_tok tokens has, at least. */
uint64_t ds_gpu_attend_bytes(const ds_gpu_backend *b, int n_tok);
/* Positions at most whose keys and values find room there. */
uint64_t ds_gpu_expand_most(const ds_gpu_backend *b, int n_tok);
/* Whether no part of it is larger than an allocation. */
bool ds_gpu_room_fits(const ds_gpu_backend *b, int n_tok);
/* Bytes of the device's memory that it takes at most; */
uint64_t ds_gpu_room_own(const ds_gpu_backend *b, int n_tok);
/* of the host's. */
size_t ds_gpu_room_bytes(const ds_gpu_backend *b, int n_tok);

/* Whether this backend's attention, or any, is the operation's layer's in the cache: what a layer's rows are in the host's
 * hands; the tail's behind all. */
static inline ds_gpu_span ds_gpu_cached_rows(const ds_gpu_backend *b, const ds_op *op) {
    const int i = op->tail ? b->attend_end - b->attend_begin : op->il - b->attend_begin;
    const ds_gpu_span s = b->room.cached;
    return (ds_gpu_span){s.at + (uint64_t)i * b->room.cached_bytes, s.host + (uint64_t)i * b->room.cached_bytes};
}

static inline const ds_request *ds_gpu_request(const ds_gpu_backend *b, const ds_op *op) {
    return b->requests[op->tail];
}
static inline ds_gpu_layer *ds_gpu_layer_of(const ds_gpu_backend *b, int il) {
    return &b->w.layers[il - b->facts.weights->layer_begin];
}

/* Whether it is for the experts of a layer that others have some of, and that is taken whole in this step (ahead.h). */
static inline bool ds_gpu_is_taken(const ds_gpu_backend *b, const ds_op *op) {
    return op->kind == DS_OP_EXPERTS && !op->split && b->facts.places->helpers[op->il - b->facts.weights->layer_begin];
}

/* One shader of this backend over a grid of workgroups. */
ds_status ds_gpu_do(ds_gpu_backend *b, const char *shader, const void *push, uint32_t bytes, uint32_t x, uint32_t y,
                    uint32_t z, ds_error *err);
static inline void ds_gpu_then(ds_gpu_backend *b) { ds_gpu_barrier(b->gpu, &b->commands); }
/* Rows that products read: of x as it is, or normalised on the way by a norm's weights; row: which, or 0. */
typedef struct ds_gpu_input {
    uint64_t x, norm, row;
} ds_gpu_input;

/* The norm of n rows of x, `width` values: that of one row is left to the products that read it, others are made in `to`.
 * A barrier is behind it where it is needed. */
ds_status ds_gpu_normed(ds_gpu_backend *b, uint64_t x, uint64_t w, uint64_t to, int n, int width, ds_gpu_input *out,
                        ds_error *err);
/* y = x W^T of n rows, ldx and ldy floats apart, flags as in product.h. */
ds_status ds_gpu_times(ds_gpu_backend *b, const ds_mat *m, uint64_t w, ds_gpu_input x, uint64_t y, int n, int ldx,
                       int ldy, uint32_t flags, ds_error *err);
/* y (n, n_embd) = the norm of rows of x; row: which, or 0. */
ds_status ds_gpu_norm(ds_gpu_backend *b, uint64_t x, uint64_t w, uint64_t y, uint64_t row, int n, int width, int ldx,
                      int ldy, ds_error *err);

/* Operations: recorded, and what is left to the host when they have run. NULL where nothing is. */
ds_status ds_gpu_place(ds_gpu_backend *b, const ds_op *op, ds_error *err);
ds_status ds_gpu_attention(ds_gpu_backend *b, const ds_op *op, ds_error *err);
ds_status ds_gpu_remember(ds_gpu_backend *b, const ds_op *op, ds_error *err);
void ds_gpu_take_rows(ds_gpu_backend *b, const ds_op *op);
ds_status ds_gpu_dense(ds_gpu_backend *b, const ds_op *op, ds_error *err);
ds_status ds_gpu_route(ds_gpu_backend *b, const ds_op *op, ds_error *err);
ds_status ds_gpu_experts(ds_gpu_backend *b, const ds_op *op, ds_error *err);
void ds_gpu_take_experts(ds_gpu_backend *b, const ds_op *op);
ds_status ds_gpu_combine(ds_gpu_backend *b, const ds_op *op, ds_error *err);
