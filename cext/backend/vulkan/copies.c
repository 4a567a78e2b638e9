/* copies.c: see copies.h. A place of the ring is filled by one thread, copied by the device, and free again when the
 * semaphore has the value of its submission: it rises by one with each. Lists wait for their copies in the order in which
 * they are given; another semaphore has the number of the last one that has run. */
#include "backend/vulkan/copies.h"

#include <string.h>

#include "backend/vulkan/internal.h"

enum {
    LOOK_NS = 100 * 1000 * 1000, /* a wait for the device looks so often whether all is to end */
};

typedef struct place {
    vk_CommandBuffer list;
    uint64_t value; /* of what was submitted from here last */
    bool filling;
} place;

/* A list that is to be submitted. */
typedef struct list {
    ds_gpu_script *script;
    int n_awaited; /* copies, and the value of the semaphore that the last of those has which are submitted */
    uint64_t value;
    bool more;
} list;

struct ds_copies {
    ds_gpu *gpu;
    uint64_t piece;
    vk_CommandPool pool;
    vk_Semaphore semaphore, done; /* done: by lists */
    ds_gpu_buffer ring;
    place *places;
    int n_places;
    ds_thread *threads;
    int n_threads;
    bool has_lock, has_signal;
    ds_lock lock; /* of all below */
    ds_signal changed;
    ds_copy **order; /* (n_order) those from `next` on are not at their end */
    int n_order, room, next;
    bool ending;
    bool idle; /* nothing was being copied since `mark` */
    uint64_t value; /* of the last submission */
    int n_filling;
    list *lists; /* (n_lists) given since all were submitted; those before next_list are */
    int n_lists, lists_room, next_list;
    uint64_t first_list; /* the number of lists[0] */
    int64_t submitted; /* when the last one was */
    ds_error failure; /* DS_OK: none */
    uint64_t bytes, ns; /* that were copied */
    int64_t mark; /* when these were counted up to */
};

/* ---- The device, under the lock ---- */

static bool reached(ds_copies *c, vk_Semaphore semaphore, uint64_t *value) {
    const vk_Result result = c->gpu->v.f.GetSemaphoreCounterValue(c->gpu->device, semaphore, value);
    if (result == VKR_SUCCESS) return true;
    if (c->failure.status == DS_OK) ds_gpu_failed(&c->failure, result, c->gpu->info.name);
    return false;
}

static ds_status submit(ds_copies *c, place *p, const ds_copy *copy, uint64_t at, uint64_t n, ds_error *err) {
    const vk_functions *f = &c->gpu->v.f;
    const vk_CommandBufferBeginInfo begin = {.sType = VKS_COMMAND_BUFFER_BEGIN_INFO};
    const vk_BufferCopy region = {(uint64_t)(p - c->places) * c->piece, copy->to_at + at, n};
    const uint64_t value = c->value + 1;
    const uint32_t stages = VKB_PIPELINE_STAGE_TRANSFER_BIT;
    const vk_TimelineSemaphoreSubmitInfo values = {.sType = VKS_TIMELINE_SEMAPHORE_SUBMIT_INFO,
                                                   .waitSemaphoreValueCount = copy->gate != 0,
                                                   .pWaitSemaphoreValues = &copy->gate,
                                                   .signalSemaphoreValueCount = 1,
                                                   .pSignalSemaphoreValues = &value};
    const vk_SubmitInfo info = {.sType = VKS_SUBMIT_INFO,
                                .pNext = &values,
                                .waitSemaphoreCount = copy->gate != 0,
                                .pWaitSemaphores = &c->done,
                                .pWaitDstStageMask = &stages,
                                .commandBufferCount = 1,
                                .pCommandBuffers = &p->list,
                                .signalSemaphoreCount = 1,
                                .pSignalSemaphores = &c->semaphore};
    vk_Result result = f->BeginCommandBuffer(p->list, &begin);
    if (result == VKR_SUCCESS) {
        f->CmdCopyBuffer(p->list, c->ring.buffer, copy->to->buffer, 1, &region);
        result = f->EndCommandBuffer(p->list);
    }
    if (result == VKR_SUCCESS) {
        ds_lock_take(&c->gpu->turn);
        result = f->QueueSubmit(c->gpu->copy_queue, 1, &info, 0);
        ds_lock_give(&c->gpu->turn);
    }
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, c->gpu->info.name);
    c->value = p->value = value;
    return DS_OK;
}

/* Until a semaphore has a value; gives the lock meanwhile. */
static void wait_value(ds_copies *c, vk_Semaphore semaphore, uint64_t value) {
    const vk_SemaphoreWaitInfo info = {
        .sType = VKS_SEMAPHORE_WAIT_INFO, .semaphoreCount = 1, .pSemaphores = &semaphore, .pValues = &value};
    ds_lock_give(&c->lock);
    const vk_Result result = c->gpu->v.f.WaitSemaphores(c->gpu->device, &info, LOOK_NS);
    ds_lock_take(&c->lock);
    if (result != VKR_SUCCESS && result != VKR_TIMEOUT && c->failure.status == DS_OK)
        ds_gpu_failed(&c->failure, result, c->gpu->info.name);
}

/* ---- The threads ---- */

static bool ended(const ds_copy *copy) { return copy->begun == copy->bytes && !copy->left; }

/* The number of the last list that is submitted. */
static uint64_t last_list(const ds_copies *c) { return c->first_list + (uint64_t)c->next_list - 1; }

/* The first copy that a piece can be taken of; NULL: none. What is behind a list waits until that is submitted: both may go
 * to one queue. */
static ds_copy *next_copy(ds_copies *c) {
    if (c->failure.status != DS_OK) return NULL;
    while (c->next < c->n_order && c->order[c->next]->begun == c->order[c->next]->bytes) c->next++;
    if (c->next == c->n_order || c->order[c->next]->gate > last_list(c)) return NULL;
    return c->order[c->next];
}

/* A place that can be filled; NULL: *value is what the semaphore must reach for one, or 0 where a thread must go on. */
static place *free_place(ds_copies *c, uint64_t *value) {
    uint64_t there = 0;
    *value = 0;
    if (!reached(c, c->semaphore, &there)) return NULL;
    for (int i = 0; i < c->n_places; i++) {
        place *p = &c->places[i];
        if (p->filling) continue;
        if (p->value <= there) return p;
        if (!*value || p->value < *value) *value = p->value;
    }
    return NULL;
}

/* Pieces of a copy are of about one size. */
static uint64_t piece_of(const ds_copies *c, const ds_copy *copy) {
    const uint64_t n = (copy->bytes + c->piece - 1) / c->piece, each = (copy->bytes + n - 1) / n,
                   left = copy->bytes - copy->begun;
    return each < left ? each : left;
}

/* Bytes [at, at + n) of what is copied. */
static void fill(unsigned char *to, const ds_copy *copy, uint64_t at, uint64_t n) {
    for (int i = 0; i < DS_COPY_PARTS; i++) {
        const uint64_t begin = copy->at[i] > at ? copy->at[i] : at, part_end = copy->at[i] + copy->part_bytes[i],
                       end = part_end < at + n ? part_end : at + n;
        if (begin < end)
            memcpy(to + (begin - at), (const unsigned char *)copy->from[i] + (begin - copy->at[i]), end - begin);
    }
}

/* Those of which all that they wait for is submitted, in order. */
static void submit_lists(ds_copies *c) {
    for (; c->next_list < c->n_lists && c->failure.status == DS_OK; c->next_list++) {
        const list *l = &c->lists[c->next_list];
        if (l->n_awaited) return;
        const ds_gpu_turn turn = {.behind = l->value ? c->semaphore : 0,
                                  .value = l->value,
                                  .raises = c->done,
                                  .raised = last_list(c) + 1,
                                  .more = l->more};
        if (ds_gpu_submit_in_turn(c->gpu, l->script, &turn, &c->failure) != DS_OK) return;
        c->submitted = ds_now_ns();
    }
    if (c->next_list < c->n_lists) return;
    c->first_list += (uint64_t)c->n_lists;
    c->n_lists = c->next_list = 0;
}

/* A copy that a list waits for is submitted. */
static void give(ds_copies *c, ds_copy *copy) {
    list *l = &c->lists[copy->awaited - c->first_list];
    copy->awaited = 0;
    if (copy->value > l->value) l->value = copy->value;
    if (!--l->n_awaited) submit_lists(c);
}

static void count(ds_copies *c, uint64_t bytes) {
    const int64_t now = ds_now_ns();
    c->ns += (uint64_t)(now - c->mark);
    c->mark = now;
    c->bytes += bytes;
}

/* One piece, into a place. */
static void take_on(ds_copies *c, ds_copy *copy, place *p) {
    const uint64_t at = copy->begun, n = piece_of(c, copy);
    copy->begun += n;
    p->filling = true;
    c->n_filling++;
    if (c->idle) c->mark = ds_now_ns();
    c->idle = false;
    ds_lock_give(&c->lock);
    fill(c->ring.host + (uint64_t)(p - c->places) * c->piece, copy, at, n);
    ds_lock_take(&c->lock);
    p->filling = false;
    c->n_filling--;
    if (c->failure.status == DS_OK && submit(c, p, copy, at, n, &c->failure) == DS_OK) {
        count(c, n);
        copy->left -= n;
        copy->value = p->value;
        if (!copy->left && copy->awaited) give(c, copy);
    }
    ds_signal_send(&c->changed);
}

static void *work(void *arg) {
    ds_copies *c = arg;
    uint64_t value;
    ds_lock_take(&c->lock);
    while (!c->ending) {
        ds_copy *copy = next_copy(c);
        place *p = copy ? free_place(c, &value) : NULL;
        c->idle |= !copy && !c->n_filling;
        if (p) take_on(c, copy, p);
        else if (copy && value) wait_value(c, c->semaphore, value);
        else if (!c->ending) ds_signal_wait(&c->changed, &c->lock);
    }
    ds_lock_give(&c->lock);
    return NULL;
}

/* ---- For the one that uses it ---- */

static ds_status make_lists(ds_copies *c, ds_error *err) {
    const vk_functions *f = &c->gpu->v.f;
    const vk_CommandPoolCreateInfo pool = {.sType = VKS_COMMAND_POOL_CREATE_INFO,
                                           .flags = VKB_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
                                           .queueFamilyIndex = c->gpu->families[c->gpu->n_families - 1]};
    const vk_SemaphoreTypeCreateInfo type = {.sType = VKS_SEMAPHORE_TYPE_CREATE_INFO,
                                             .semaphoreType = VKB_SEMAPHORE_TYPE_TIMELINE};
    const vk_SemaphoreCreateInfo semaphore = {.sType = VKS_SEMAPHORE_CREATE_INFO, .pNext = &type};
    vk_Result result = f->CreateCommandPool(c->gpu->device, &pool, NULL, &c->pool);
    if (result == VKR_SUCCESS) result = f->CreateSemaphore(c->gpu->device, &semaphore, NULL, &c->semaphore);
    if (result == VKR_SUCCESS) result = f->CreateSemaphore(c->gpu->device, &semaphore, NULL, &c->done);
    for (int i = 0; i < c->n_places && result == VKR_SUCCESS; i++) {
        const vk_CommandBufferAllocateInfo info = {.sType = VKS_COMMAND_BUFFER_ALLOCATE_INFO,
                                                   .commandPool = c->pool,
                                                   .level = VKB_COMMAND_BUFFER_LEVEL_PRIMARY,
                                                   .commandBufferCount = 1};
        result = f->AllocateCommandBuffers(c->gpu->device, &info, &c->places[i].list);
    }
    return result == VKR_SUCCESS ? DS_OK : ds_gpu_failed(err, result, c->gpu->info.name);
}

static ds_status start(ds_copies *c, int n_threads, ds_error *err) {
    c->has_lock = ds_lock_init(&c->lock);
    c->has_signal = ds_signal_init(&c->changed);
    if (!c->has_lock || !c->has_signal) return ds_fail(err, DS_ENOMEM, "no memory for a lock");
    for (; c->n_threads < n_threads; c->n_threads++)
        if (ds_thread_start(work, c, &c->threads[c->n_threads]) != 0)
            return ds_fail(err, DS_ENOMEM, "cannot start a thread that copies to a GPU");
    return DS_OK;
}

ds_status ds_copies_create(ds_gpu *gpu, int n_threads, uint64_t piece, ds_copies **out, ds_error *err) {
    ds_copies *c = calloc(1, sizeof *c);
    if (!c) return ds_fail(err, DS_ENOMEM, "no memory for copies to a GPU");
    c->gpu = gpu;
    c->first_list = 1;
    c->piece = ds_gpu_padded(piece);
    c->n_places = n_threads + DS_COPY_AHEAD;
    c->places = calloc((size_t)c->n_places, sizeof *c->places);
    c->threads = calloc((size_t)n_threads, sizeof *c->threads);
    ds_status st = c->places && c->threads ? DS_OK : ds_fail(err, DS_ENOMEM, "no memory for copies to a GPU");
    if (st == DS_OK) st = ds_gpu_buffer_new(gpu, (uint64_t)c->n_places * c->piece, DS_GPU_OUT, &c->ring, err);
    if (st == DS_OK) st = make_lists(c, err);
    if (st == DS_OK) st = start(c, n_threads, err);
    if (st == DS_OK) *out = c;
    else ds_copies_destroy(c);
    return st;
}

static void wait_all(ds_copies *c, vk_Semaphore semaphore, uint64_t value) {
    uint64_t there = 0;
    while (value && c->failure.status == DS_OK && reached(c, semaphore, &there) && there < value)
        wait_value(c, semaphore, value);
}

/* Where something was submitted, until all of it is done: its lists and memory can be given back then. */
static void drain(ds_copies *c) {
    wait_all(c, c->semaphore, c->value);
    wait_all(c, c->done, last_list(c));
}

void ds_copies_destroy(ds_copies *c) {
    const vk_functions *f = &c->gpu->v.f;
    if (c->has_lock) ds_lock_take(&c->lock);
    c->ending = true;
    if (c->has_signal) ds_signal_send(&c->changed);
    if (c->has_lock) ds_lock_give(&c->lock);
    for (int i = 0; i < c->n_threads; i++) ds_thread_join(c->threads[i]);
    if (c->value || (c->done && last_list(c))) {
        ds_lock_take(&c->lock);
        drain(c);
        ds_lock_give(&c->lock);
    }
    if (c->pool) f->DestroyCommandPool(c->gpu->device, c->pool, NULL); /* and its lists */
    if (c->semaphore) f->DestroySemaphore(c->gpu->device, c->semaphore, NULL);
    if (c->done) f->DestroySemaphore(c->gpu->device, c->done, NULL);
    ds_gpu_buffer_release(c->gpu, &c->ring);
    if (c->has_signal) ds_signal_free(&c->changed);
    if (c->has_lock) ds_lock_free(&c->lock);
    free(c->order);
    free(c->lists);
    free(c->places);
    free(c->threads);
    free(c);
}

uint64_t ds_copies_ring_bytes(const ds_copies *c) { return c->ring.bytes; }

uint64_t ds_copies_drop(ds_copies *c, ds_copy *const *some, int n, bool *begun) {
    uint64_t under_way = 0;
    int kept = 0;
    ds_lock_take(&c->lock);
    for (int i = 0; i < n; i++) begun[i] = some[i]->begun != 0;
    for (int i = 0; i < c->n_order; i++) {
        if (!c->order[i]->begun) c->order[i]->ordered = false;
        if (!c->order[i]->begun || ended(c->order[i])) continue;
        under_way += c->order[i]->left;
        c->order[kept++] = c->order[i];
    }
    c->n_order = kept, c->next = 0;
    ds_lock_give(&c->lock);
    return under_way;
}

void ds_copies_order(ds_copies *c, ds_copy *const *order, int n) {
    ds_lock_take(&c->lock);
    if (c->n_order + n > c->room) {
        ds_copy **more = realloc(c->order, (size_t)(c->n_order + n) * sizeof *more);
        if (more) c->order = more, c->room = c->n_order + n;
        else ds_fail(&c->failure, DS_ENOMEM, "no memory for a list of copies"), n = 0;
    }
    for (int i = 0; i < n; i++) {
        if (order[i]->ordered) continue; /* it is there, or will be */
        order[i]->ordered = true;
        order[i]->left = order[i]->bytes;
        c->order[c->n_order++] = order[i];
    }
    ds_signal_send(&c->changed);
    ds_lock_give(&c->lock);
}

/* Room for another list; false, with a failure, where there is no memory. */
static bool make_list(ds_copies *c) {
    const int room = c->lists_room ? 2 * c->lists_room : 16;
    if (c->n_lists < c->lists_room) return true;
    list *more = realloc(c->lists, (size_t)room * sizeof *more);
    if (!more) return ds_fail(&c->failure, DS_ENOMEM, "no memory for a list of commands"), false;
    c->lists = more, c->lists_room = room;
    return true;
}

uint64_t ds_copies_then(ds_copies *c, ds_copy *const *awaited, int n, ds_gpu_script *script, bool more) {
    list l = {.script = script, .more = more};
    ds_lock_take(&c->lock);
    const uint64_t number = c->first_list + (uint64_t)c->n_lists;
    if (make_list(c)) {
        for (int i = 0; i < n; i++) {
            awaited[i]->awaited = ended(awaited[i]) ? 0 : number;
            l.n_awaited += !ended(awaited[i]);
            if (awaited[i]->value > l.value) l.value = awaited[i]->value;
        }
        c->lists[c->n_lists++] = l;
        submit_lists(c);
        ds_signal_send(&c->changed);
    }
    ds_lock_give(&c->lock);
    return number;
}

ds_status ds_copies_submitted(ds_copies *c, int64_t *when, ds_error *err) {
    ds_lock_take(&c->lock);
    while (c->n_lists && c->failure.status == DS_OK) ds_signal_wait(&c->changed, &c->lock);
    const ds_status st = c->n_lists ? c->failure.status : DS_OK; /* another copy's failure is the next list's */
    if (st != DS_OK) *err = c->failure;
    else *when = c->submitted;
    ds_lock_give(&c->lock);
    return st;
}

ds_status ds_copies_reached(ds_copies *c, uint64_t number, ds_error *err) {
    ds_lock_take(&c->lock);
    while (number > last_list(c) && c->failure.status == DS_OK) ds_signal_wait(&c->changed, &c->lock);
    wait_all(c, c->done, number);
    const ds_status st = c->failure.status;
    if (st != DS_OK) *err = c->failure;
    ds_lock_give(&c->lock);
    return st;
}

static bool is_under_way(const ds_copies *c, ds_copy *const *all, int n, uint64_t *value) {
    bool under_way = false;
    for (int i = 0; i < n; i++) {
        if (!all[i]->ordered) continue;
        under_way |= !ended(all[i]);
        if (all[i]->value > *value) *value = all[i]->value;
    }
    return under_way && c->failure.status == DS_OK;
}

void ds_copies_settle(ds_copies *c, ds_copy *const *all, int n) {
    uint64_t value = 0;
    ds_lock_take(&c->lock);
    while (is_under_way(c, all, n, &value)) ds_signal_wait(&c->changed, &c->lock);
    while (c->n_filling && c->failure.status != DS_OK) ds_signal_wait(&c->changed, &c->lock);
    wait_all(c, c->semaphore, value);
    ds_lock_give(&c->lock);
}

void ds_copies_reset(ds_copies *c) {
    ds_lock_take(&c->lock);
    c->n_order = c->next = 0; /* what a thread fills it brings to its end; no further piece is taken */
    for (int i = 0; i < c->n_lists; i++) c->lists[i].n_awaited = -1; /* no copy lets one go */
    while (c->n_filling) ds_signal_wait(&c->changed, &c->lock);
    c->first_list = last_list(c) + 1;
    c->n_lists = c->next_list = 0;
    c->failure.status = DS_OK;
    drain(c);
    c->failure.status = DS_OK; /* a device that is lost says so again */
    ds_lock_give(&c->lock);
}

void ds_copies_told(ds_copies *c, uint64_t *bytes, uint64_t *ns) {
    ds_lock_take(&c->lock);
    *bytes = c->bytes, *ns = c->ns;
    ds_lock_give(&c->lock);
}
