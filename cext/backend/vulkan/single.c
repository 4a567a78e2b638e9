#include "backend/vulkan/single.h"

#include <stdlib.h>
#include <string.h>

#include "backend/vulkan/copies.h"

enum { HALVES_BYTES = 1 << 20 };

static ds_status check(const ds_gpu_single *job, ds_error *err) {
    if (job->push_bytes > DS_GPU_PUSH || job->push_bytes % 4)
        return ds_fail(err, DS_EINVAL, "%u bytes of push constants, expected dwords of at most %d bytes",
                       job->push_bytes, DS_GPU_PUSH);
    if (!job->shader && job->push_bytes != sizeof(ds_gpu_product))
        return ds_fail(err, DS_EINVAL, "%u bytes of a product, expected %zu", job->push_bytes, sizeof(ds_gpu_product));
    for (int i = 0; i < job->n_links; i++) {
        const ds_gpu_link *l = &job->links[i];
        if (l->where < -1 || l->where >= job->n_arrays || l->to < 0 || l->to >= job->n_arrays)
            return ds_fail(err, DS_EINVAL, "link %d: from array %d to %d, there are %d", i, l->where, l->to,
                           job->n_arrays);
        const uint64_t room = l->where < 0 ? job->push_bytes : job->arrays[l->where].bytes;
        if (room < 8 || l->at > room - 8 || l->to_at > job->arrays[l->to].bytes)
            return ds_fail(err, DS_EINVAL, "link %d lies outside of its array", i);
    }
    return DS_OK;
}

static ds_status fill(ds_gpu *g, const ds_gpu_single *job, ds_gpu_buffer *buffers, unsigned char *push, ds_error *err) {
    ds_status st = DS_OK;
    for (int i = 0; i < job->n_arrays && st == DS_OK; i++) {
        st = ds_gpu_buffer_new(g, job->arrays[i].bytes, DS_GPU_OWN, &buffers[i], err);
        if (st == DS_OK) st = ds_gpu_write(g, &buffers[i], 0, job->arrays[i].data, job->arrays[i].bytes, err);
    }
    memcpy(push, job->push, job->push_bytes);
    for (int i = 0; i < job->n_links && st == DS_OK; i++) {
        const ds_gpu_link *l = &job->links[i];
        const uint64_t address = buffers[l->to].address + l->to_at;
        if (l->where < 0) memcpy(push + l->at, &address, sizeof address);
        else st = ds_gpu_write(g, &buffers[l->where], l->at, &address, sizeof address, err);
    }
    return st;
}

/* Room for factors in halves: of weights little, so that larger ones come piece by piece. */
static ds_status make_halves(ds_gpu *g, const ds_gpu_single *job, const unsigned char *push, ds_gpu_buffer *buffer,
                             ds_gpu_halves *out, ds_error *err) {
    ds_gpu_product p;
    if (job->shader || !ds_gpu_told(g)->coop[0]) return DS_OK;
    memcpy(&p, push, sizeof p);
    const uint64_t n_blocks = job->operation.n_blocks, w = HALVES_BYTES,
                   x = ds_gpu_padded(ds_gpu_halved_rows(g, p.n_slots * n_blocks, n_blocks, p.k));
    const ds_status st = ds_gpu_buffer_new(g, x + w, DS_GPU_OWN, buffer, err);
    *out = (ds_gpu_halves){buffer->address + x, buffer->address, w};
    return st;
}

static ds_status operate(ds_gpu *g, ds_gpu_commands *c, const ds_gpu_operation *o, const ds_gpu_halves *h,
                         const ds_gpu_product *p, ds_error *err) {
    if (strcmp(o->name, "mul") == 0) return ds_gpu_mul(g, c, h, o->format, p, o->n_blocks, err);
    if (strcmp(o->name, "mul_gated") == 0)
        return ds_gpu_mul_gated(g, c, h, o->format, o->up_format, o->up_row_bytes, p, o->n_blocks, err);
    if (strcmp(o->name, "mul_sum") == 0) return ds_gpu_mul_sum(g, c, o->format, p, o->n_blocks, p->up, p->x_scale, err);
    if (strcmp(o->name, "pack") == 0) return ds_gpu_pack(g, c, p, err);
    if (strcmp(o->name, "rows") == 0) return ds_gpu_rows(g, c, o->format, p, err);
    return ds_fail(err, DS_EINVAL, "there is no operation `%s`", o->name);
}

static ds_status record(ds_gpu *g, ds_gpu_commands *c, const ds_gpu_single *job, const unsigned char *push,
                        const ds_gpu_halves *h, ds_error *err) {
    vk_Pipeline pipeline;
    ds_gpu_product product;
    if (!job->shader) return memcpy(&product, push, sizeof product), operate(g, c, &job->operation, h, &product, err);
    const ds_status st = ds_gpu_pipeline(g, job->shader, job->specs, job->n_specs, &pipeline, err);
    if (st == DS_OK)
        ds_gpu_dispatch(g, c, pipeline, push, job->push_bytes, job->groups[0], job->groups[1], job->groups[2]);
    return st;
}

static ds_status run(ds_gpu *g, const ds_gpu_single *job, const unsigned char *push, ds_error *err) {
    ds_gpu_commands commands = {0};
    ds_gpu_buffer room = {0};
    ds_gpu_halves halves = {0};
    ds_status st = make_halves(g, job, push, &room, &halves, err);
    if (st == DS_OK) st = ds_gpu_record(g, &commands, err);
    if (st == DS_OK) st = record(g, &commands, job, push, &halves, err);
    if (st == DS_OK) st = ds_gpu_recorded(g, &commands, err);
    if (st == DS_OK) st = ds_gpu_submit(g, &commands, err);
    if (st == DS_OK) st = ds_gpu_wait(g, err);
    ds_gpu_commands_release(g, &commands);
    ds_gpu_buffer_release(g, &room);
    return st;
}

ds_status ds_gpu_run_single(ds_gpu *g, const ds_gpu_single *job, ds_error *err) {
    unsigned char push[DS_GPU_PUSH] = {0};
    ds_status st = check(job, err);
    if (st != DS_OK) return st;
    ds_gpu_buffer *buffers = calloc((size_t)job->n_arrays + 1, sizeof *buffers);
    if (!buffers) return ds_fail(err, DS_ENOMEM, "no memory for %d arrays", job->n_arrays);
    st = fill(g, job, buffers, push, err);
    if (st == DS_OK) st = run(g, job, push, err);
    for (int i = 0; i < job->n_arrays && st == DS_OK; i++)
        if (job->arrays[i].changes) st = ds_gpu_read(g, &buffers[i], 0, job->arrays[i].data, job->arrays[i].bytes, err);
    for (int i = 0; i < job->n_arrays; i++) ds_gpu_buffer_release(g, &buffers[i]);
    free(buffers);
    return st;
}

/* ---- Copies by threads ---- */

static int lay_copies(const ds_gpu_array *arrays, int n, const ds_gpu_buffer *to, ds_copy *out) {
    int n_copies = 0;
    uint64_t used = 0;
    for (int i = 0; i < n; i++) {
        ds_copy *c = &out[i / DS_COPY_PARTS];
        const int part = i % DS_COPY_PARTS;
        if (!part) *c = (ds_copy){.to = to, .to_at = used}, n_copies++;
        c->from[part] = arrays[i].data, c->part_bytes[part] = arrays[i].bytes, c->at[part] = used - c->to_at;
        c->bytes = c->at[part] + arrays[i].bytes;
        used += ds_gpu_padded(arrays[i].bytes);
    }
    return n_copies;
}

/* Half of them are ordered, then all, the last first. */
static ds_status order_copies(ds_gpu *g, ds_copies *copies, ds_copy **all, int n, const ds_gpu_commands *list,
                              ds_error *err) {
    ds_error other;
    int64_t when = 0;
    ds_copies_order(copies, all, (n + 1) / 2);
    for (int i = 0; i < n / 2; i++) {
        ds_copy *c = all[i];
        all[i] = all[n - 1 - i], all[n - 1 - i] = c;
    }
    ds_copies_drop(copies, NULL, 0, NULL);
    ds_copies_order(copies, all, n);
    ds_copies_then(copies, all, n, ds_gpu_list_of(list), false);
    const ds_status st = ds_copies_submitted(copies, &when, err), run = ds_gpu_wait(g, st == DS_OK ? err : &other);
    ds_copies_settle(copies, all, n);
    return st == DS_OK ? run : st;
}

static ds_status run_copies(ds_gpu *g, const ds_gpu_array *arrays, int n, ds_copies *copies, ds_gpu_buffer buffers[2],
                            ds_copy *copy, ds_copy **all, ds_error *err) {
    ds_gpu_commands list = {0};
    const int n_copies = lay_copies(arrays, n, &buffers[0], copy);
    for (int i = 0; i < n_copies; i++) all[i] = &copy[i];
    ds_status st = ds_gpu_record(g, &list, err);
    ds_gpu_copy(g, &list, &buffers[0], 0, &buffers[1], 0, buffers[0].bytes);
    if (st == DS_OK) st = ds_gpu_recorded(g, &list, err);
    if (st == DS_OK) st = order_copies(g, copies, all, n_copies, &list, err);
    ds_gpu_commands_release(g, &list);
    return st;
}

ds_status ds_gpu_run_copies(ds_gpu *g, const ds_gpu_array *arrays, int n, int n_threads, uint64_t piece,
                            unsigned char *out, uint64_t out_bytes, ds_error *err) {
    ds_gpu_buffer buffers[2] = {0};
    ds_copies *copies = NULL;
    ds_copy *copy = calloc((size_t)n + 1, sizeof *copy), **all = calloc((size_t)n + 1, sizeof *all);
    ds_status st = copy && all ? DS_OK : ds_fail(err, DS_ENOMEM, "no memory for %d arrays", n);
    if (st == DS_OK && (n_threads < 1 || n_threads > DS_COPY_THREADS || !piece || piece > DS_COPY_PIECE))
        st = ds_fail(err, DS_EINVAL, "%d threads and pieces of %llu bytes", n_threads, (unsigned long long)piece);
    for (int i = 0; i < 2 && st == DS_OK; i++)
        st = ds_gpu_buffer_new(g, out_bytes, i ? DS_GPU_OUT : DS_GPU_OWN, &buffers[i], err);
    if (st == DS_OK) st = ds_copies_create(g, n_threads, piece, &copies, err);
    for (int round = 0; round < 2 && st == DS_OK; round++) {
        if (round) ds_copies_reset(copies);
        st = run_copies(g, arrays, n, copies, buffers, copy, all, err);
        if (st == DS_OK) memcpy(out, buffers[1].host, out_bytes);
        if (st == DS_OK && !round) memset(buffers[1].host, 0, out_bytes);
    }
    if (copies) ds_copies_destroy(copies);
    for (int i = 0; i < 2; i++) ds_gpu_buffer_release(g, &buffers[i]);
    free(copy);
    free(all);
    return st;
}
