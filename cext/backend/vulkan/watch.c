/* watch.c: what a GPU's time goes to: a reading of its clock behind each dispatch of a list, and counts. */
#include "backend/vulkan/internal.h"

#include <string.h>

enum { MOST_READINGS = 8192 /* of a list; what comes behind is not timed */ };

struct ds_gpu_watch {
    vk_QueryPool pool;
    int n; /* readings */
    const char *names[MOST_READINGS]; /* of the shader before each; the first is before all */
    uint64_t ticks[MOST_READINGS];
};

static const char *name_of(const ds_gpu *g, vk_Pipeline pipeline) {
    for (int i = 0; i < g->n_made; i++)
        if (g->made[i].pipeline == pipeline) return g->made[i].name;
    return "?";
}

static void read_clock(ds_gpu *g, ds_gpu_script *c, const char *name) {
    ds_gpu_watch *w = c->watch;
    if (w->n == MOST_READINGS) return;
    w->names[w->n] = name;
    g->v.f.CmdWriteTimestamp(c->list, VKB_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, w->pool, (uint32_t)w->n++);
}

/* NULL where there is no memory: then the list is not timed. */
static ds_gpu_watch *new_watch(ds_gpu *g) {
    const vk_QueryPoolCreateInfo info = {
        .sType = VKS_QUERY_POOL_CREATE_INFO, .queryType = VKB_QUERY_TYPE_TIMESTAMP, .queryCount = MOST_READINGS};
    ds_gpu_watch *w = calloc(1, sizeof *w);
    if (w && g->v.f.CreateQueryPool(g->device, &info, NULL, &w->pool) == VKR_SUCCESS) return w;
    free(w);
    return NULL;
}

void ds_gpu_watch_record(ds_gpu *g, ds_gpu_script *c) {
    if (!g->watched) return;
    if (!c->watch && !(c->watch = new_watch(g))) return;
    c->watch->n = 0;
    g->v.f.CmdResetQueryPool(c->list, c->watch->pool, 0, MOST_READINGS);
    read_clock(g, c, NULL);
}

void ds_gpu_watch_dispatched(ds_gpu *g, ds_gpu_script *c, vk_Pipeline pipeline) {
    if (g->watched && c->watch) read_clock(g, c, name_of(g, pipeline));
}

/* NULL where there are too many. */
static ds_work_time *time_of(ds_gpu *g, const char *name) {
    for (int i = 0; i < g->n_times; i++)
        if (g->times[i].name == name) return &g->times[i];
    if (g->n_times == DS_WORK_TIMES) return NULL;
    g->times[g->n_times] = (ds_work_time){.name = name};
    return &g->times[g->n_times++];
}

void ds_gpu_watch_take(ds_gpu *g, const ds_gpu_script *c) {
    ds_gpu_watch *w = c->watch;
    if (!g->watched || !c->watched || !w || w->n < 2) return;
    const vk_Result result =
        g->v.f.GetQueryPoolResults(g->device, w->pool, 0, (uint32_t)w->n, (size_t)w->n * sizeof *w->ticks, w->ticks,
                                   sizeof *w->ticks, VKB_QUERY_RESULT_64_BIT | VKB_QUERY_RESULT_WAIT_BIT);
    for (int i = 1; i < w->n && result == VKR_SUCCESS; i++) {
        ds_work_time *t = time_of(g, w->names[i]);
        if (!t) continue;
        t->n++;
        if (w->ticks[i] > w->ticks[i - 1])
            t->ns += (uint64_t)((double)(w->ticks[i] - w->ticks[i - 1]) * g->info.tick_ns);
    }
}

void ds_gpu_watch_forget(ds_gpu *g, ds_gpu_script *c) {
    if (c->watch) g->v.f.DestroyQueryPool(g->device, c->watch->pool, NULL);
    free(c->watch);
    c->watch = NULL;
}

ds_status ds_gpu_watch_begin(ds_gpu *g, bool times, ds_error *err) {
    if (times && !g->info.tick_ns)
        return ds_fail(err, DS_EUNSUPPORTED, "%s: it has no clock that shaders can be timed by", g->info.name);
    g->watched = times;
    g->n_times = 0;
    g->work = (ds_work){0};
    g->own_most = g->own;
    return DS_OK;
}

int ds_gpu_watched(const ds_gpu *g, ds_work_time out[DS_WORK_TIMES], ds_work *work) {
    *work = g->work;
    work->memory = g->own, work->memory_most = g->own_most;
    memcpy(out, g->times, (size_t)g->n_times * sizeof *out);
    return g->n_times;
}

/* Seconds that the list takes, by the host's clock: the least of `runs`. */
static ds_status time_list(ds_gpu *g, int runs, double *out, ds_error *err) {
    ds_status st = ds_gpu_recorded(g, &g->copies, err);
    for (int i = 0; i < runs && st == DS_OK; i++) {
        const int64_t begin = ds_now_ns();
        st = ds_gpu_submit(g, &g->copies, err);
        if (st == DS_OK) st = ds_gpu_wait(g, err);
        const double seconds = (double)(ds_now_ns() - begin + 1) / 1e9;
        if (!i || seconds < *out) *out = seconds;
    }
    return st;
}

/* Bytes a second of copies in one list. */
static ds_status time_copies(ds_gpu *g, const ds_gpu_buffer *from, const ds_gpu_buffer *to, double *out,
                             ds_error *err) {
    enum { COPIES = 4 };
    double seconds = 0;
    ds_status st = ds_gpu_record(g, &g->copies, err);
    if (st != DS_OK) return st;
    for (int i = 0; i < COPIES; i++) ds_gpu_copy(g, &g->copies, from, 0, to, 0, from->bytes);
    st = time_list(g, 2, &seconds, err);
    if (st == DS_OK) *out = COPIES * (double)from->bytes / seconds;
    return st;
}

ds_status ds_gpu_rates(ds_gpu *g, uint64_t bytes, double *in, double *out, ds_error *err) {
    ds_gpu_buffer host = {0}, own = {0};
    ds_status st = ds_gpu_buffer_new(g, bytes, DS_GPU_OUT, &host, err);
    if (st == DS_OK) st = ds_gpu_buffer_new(g, bytes, DS_GPU_OWN, &own, err);
    if (st == DS_OK) st = time_copies(g, &host, &own, in, err);
    if (st == DS_OK) st = time_copies(g, &own, &host, out, err);
    ds_gpu_buffer_release(g, &host);
    ds_gpu_buffer_release(g, &own);
    return st;
}

ds_status ds_gpu_reads(ds_gpu *g, uint64_t bytes, double *rate, ds_error *err) {
    enum { GROUPS = 1024, READS = 4, RUNS = 5 };
    ds_gpu_buffer from = {0}, sums = {0};
    vk_Pipeline pipeline;
    double seconds = 0;
    if (!bytes || bytes % 16 || bytes > DS_GPU_CHUNK)
        return ds_fail(err, DS_EINVAL, "%llu bytes to read: not a multiple of 16 up to %d", (unsigned long long)bytes,
                       DS_GPU_CHUNK);
    ds_status st = ds_gpu_pipeline(g, "read", NULL, 0, &pipeline, err);
    if (st == DS_OK) st = ds_gpu_buffer_new(g, bytes, DS_GPU_OWN, &from, err);
    if (st == DS_OK) st = ds_gpu_buffer_new(g, GROUPS * sizeof(uint32_t), DS_GPU_OWN, &sums, err);
    if (st == DS_OK) st = ds_gpu_record(g, &g->copies, err);
    if (st == DS_OK) {
        const struct {
            uint64_t from, to;
            uint32_t n;
        } push = {from.address, sums.address, (uint32_t)(bytes / 16)};
        for (int i = 0; i < READS; i++) {
            ds_gpu_dispatch(g, &g->copies, pipeline, &push, 20, GROUPS, 1, 1);
            ds_gpu_barrier(g, &g->copies);
        }
        st = time_list(g, RUNS, &seconds, err);
    }
    if (st == DS_OK) *rate = READS * (double)bytes / seconds;
    ds_gpu_buffer_release(g, &from);
    ds_gpu_buffer_release(g, &sums);
    return st;
}
