/* commands.c: lists of commands. They are told command by command, and recorded for the device only where that is not what
 * the list holds: most steps differ in what lies in memory alone. Nothing but copies refers to a buffer, which may go:
 * all else reaches memory by address. */
#include "backend/vulkan/internal.h"

#include <string.h>

enum {
    DS_SPIN_NS = 200000 /* a wait looks so long before it sleeps: waking up costs more than most steps' parts take */
};

ds_gpu_script *ds_gpu_list_of(const ds_gpu_commands *c) { return c->lists[c->at]; }

void ds_gpu_commands_release(ds_gpu *g, ds_gpu_commands *c) {
    for (int i = 0; i < c->n; i++) {
        ds_gpu_script *l = c->lists[i];
        if (!l) continue;
        ds_gpu_watch_forget(g, l);
        if (l->list) g->v.f.FreeCommandBuffers(g->device, g->pool, 1, &l->list);
        free(l->log);
        free(l);
    }
    free(c->lists);
    *c = (ds_gpu_commands){0};
}

ds_status ds_gpu_record(ds_gpu *g, ds_gpu_commands *c, ds_error *err) {
    const vk_CommandBufferAllocateInfo info = {.sType = VKS_COMMAND_BUFFER_ALLOCATE_INFO,
                                               .commandPool = g->pool,
                                               .level = VKB_COMMAND_BUFFER_LEVEL_PRIMARY,
                                               .commandBufferCount = 1};
    if (c->at >= c->n) {
        ds_gpu_script **more = realloc(c->lists, (size_t)(c->at + 1) * sizeof *more);
        if (!more) return ds_fail(err, DS_ENOMEM, "no memory for a list of commands");
        memset(more + c->n, 0, (size_t)(c->at + 1 - c->n) * sizeof *more);
        c->lists = more;
        c->n = c->at + 1;
    }
    if (!c->lists[c->at] && !(c->lists[c->at] = calloc(1, sizeof **c->lists)))
        return ds_fail(err, DS_ENOMEM, "no memory for a list of commands");
    ds_gpu_script *l = ds_gpu_list_of(c);
    if (!l->list) {
        const vk_Result result = g->v.f.AllocateCommandBuffers(g->device, &info, &l->list);
        if (result != VKR_SUCCESS) return l->list = NULL, ds_gpu_failed(err, result, g->info.name);
    }
    l->at = 0;
    l->full = false;
    l->same = l->ready && l->watched == g->watched;
    return DS_OK;
}

/* The next command: kept where the list holds it already. Whole structs are compared: they are made from zeros. */
static void tell(ds_gpu_script *l, const ds_gpu_command *command) {
    if (l->same && l->at < l->n && memcmp(&l->log[l->at], command, sizeof *command) == 0) {
        l->at++;
        return;
    }
    l->same = l->ready = false; /* what is told and what is recorded are two from here on */
    if (l->at == l->room) {
        const int room = l->room ? 2 * l->room : 64;
        ds_gpu_command *more = realloc(l->log, (size_t)room * sizeof *more);
        l->full |= !more;
        if (!more) return;
        l->log = more, l->room = room;
    }
    l->log[l->at++] = *command;
}

void ds_gpu_dispatch(ds_gpu *g, ds_gpu_commands *c, vk_Pipeline pipeline, const void *push, uint32_t bytes, uint32_t x,
                     uint32_t y, uint32_t z) {
    ds_gpu_command command;
    if (!x || !y || !z) return;
    memset(&command, 0, sizeof command); /* what lies between members too */
    command.kind = DS_GPU_DISPATCH;
    command.bytes = bytes, command.x = x, command.y = y, command.z = z, command.pipeline = pipeline;
    memcpy(command.push, push, bytes);
    tell(ds_gpu_list_of(c), &command);
}

void ds_gpu_barrier(ds_gpu *g, ds_gpu_commands *c) {
    ds_gpu_command command;
    ds_gpu_script *l = ds_gpu_list_of(c);
    if (!l->at || l->log[l->at - 1].kind == DS_GPU_BARRIER) return;
    memset(&command, 0, sizeof command);
    command.kind = DS_GPU_BARRIER;
    tell(l, &command);
}

void ds_gpu_copy(ds_gpu *g, ds_gpu_commands *c, const ds_gpu_buffer *from, uint64_t at, const ds_gpu_buffer *to,
                 uint64_t to_at, uint64_t bytes) {
    ds_gpu_command command;
    if (!bytes) return;
    memset(&command, 0, sizeof command);
    command.kind = DS_GPU_COPY;
    command.from = from->buffer, command.to = to->buffer;
    command.region = (vk_BufferCopy){at, to_at, bytes};
    ds_gpu_list_of(c)->same = false; /* a buffer may be another one of the same number */
    tell(ds_gpu_list_of(c), &command);
}

/* ---- Recorded, and run ---- */

/* What was written before is seen by what follows, in lists submitted later too; and by more, if said. */
static void barrier(ds_gpu *g, vk_CommandBuffer list, uint32_t more_stages, uint32_t more_reads) {
    const uint32_t stages = VKB_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VKB_PIPELINE_STAGE_TRANSFER_BIT;
    const uint32_t writes = VKB_ACCESS_SHADER_WRITE_BIT | VKB_ACCESS_TRANSFER_WRITE_BIT,
                   reads = VKB_ACCESS_SHADER_READ_BIT | VKB_ACCESS_TRANSFER_READ_BIT;
    const vk_MemoryBarrier memory = {
        .sType = VKS_MEMORY_BARRIER, .srcAccessMask = writes, .dstAccessMask = reads | writes | more_reads};
    g->v.f.CmdPipelineBarrier(list, stages, stages | more_stages, 0, 1, &memory, 0, NULL, 0, NULL);
}

static void put(ds_gpu *g, ds_gpu_script *l, const ds_gpu_command *c) {
    const vk_functions *f = &g->v.f;
    switch (c->kind) {
    case DS_GPU_BARRIER:
        l->n_barriers++;
        barrier(g, l->list, 0, 0);
        break;
    case DS_GPU_DISPATCH:
        l->n_dispatches++;
        f->CmdBindPipeline(l->list, VKB_PIPELINE_BIND_POINT_COMPUTE, c->pipeline);
        f->CmdPushConstants(l->list, g->layout, VKB_SHADER_STAGE_COMPUTE_BIT, 0, c->bytes, c->push);
        f->CmdDispatch(l->list, c->x, c->y, c->z);
        ds_gpu_watch_dispatched(g, l, c->pipeline);
        break;
    case DS_GPU_COPY:
        f->CmdCopyBuffer(l->list, c->from, c->to, 1, &c->region);
        break;
    }
}

ds_status ds_gpu_recorded(ds_gpu *g, ds_gpu_commands *c, ds_error *err) {
    const vk_CommandBufferBeginInfo info = {.sType = VKS_COMMAND_BUFFER_BEGIN_INFO};
    ds_gpu_script *l = ds_gpu_list_of(c);
    if (l->full) return l->ready = false, ds_fail(err, DS_ENOMEM, "no memory for a list of commands");
    if (l->same && l->at == l->n) return DS_OK;
    l->n = l->at;
    l->ready = false;
    l->n_dispatches = l->n_barriers = 0;
    l->watched = g->watched;
    if (!l->n) return DS_OK;
    vk_Result result = g->v.f.BeginCommandBuffer(l->list, &info);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, g->info.name);
    ds_gpu_watch_record(g, l);
    for (int i = 0; i < l->n; i++) put(g, l, &l->log[i]);
    barrier(g, l->list, VKB_PIPELINE_STAGE_HOST_BIT, VKB_ACCESS_HOST_READ_BIT);
    result = g->v.f.EndCommandBuffer(l->list);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, g->info.name);
    g->work.recordings++;
    l->ready = true;
    return DS_OK;
}

ds_status ds_gpu_submit(ds_gpu *g, const ds_gpu_commands *c, ds_error *err) {
    return ds_gpu_submit_in_turn(g, ds_gpu_list_of(c), &(ds_gpu_turn){0}, err);
}

/* The host's writes before a submission are seen by it: no barrier is needed. A fence is for all that was submitted before
 * it, too. */
ds_status ds_gpu_submit_in_turn(ds_gpu *g, ds_gpu_script *l, const ds_gpu_turn *turn, ds_error *err) {
    const uint32_t stages = VKB_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VKB_PIPELINE_STAGE_TRANSFER_BIT;
    const vk_TimelineSemaphoreSubmitInfo values = {.sType = VKS_TIMELINE_SEMAPHORE_SUBMIT_INFO,
                                                   .waitSemaphoreValueCount = turn->behind != 0,
                                                   .pWaitSemaphoreValues = &turn->value,
                                                   .signalSemaphoreValueCount = turn->raises != 0,
                                                   .pSignalSemaphoreValues = &turn->raised};
    const vk_SubmitInfo info = {.sType = VKS_SUBMIT_INFO,
                                .pNext = turn->behind || turn->raises ? &values : NULL,
                                .waitSemaphoreCount = turn->behind != 0,
                                .pWaitSemaphores = &turn->behind,
                                .pWaitDstStageMask = &stages,
                                .commandBufferCount = l->n != 0,
                                .pCommandBuffers = &l->list,
                                .signalSemaphoreCount = turn->raises != 0,
                                .pSignalSemaphores = &turn->raises};
    if (!l->n && !turn->raises) return DS_OK;
    ds_lock_take(&g->turn);
    vk_Result result = turn->more ? VKR_SUCCESS : g->v.f.ResetFences(g->device, 1, &g->fence);
    if (result == VKR_SUCCESS) result = g->v.f.QueueSubmit(g->queue, 1, &info, turn->more ? 0 : g->fence);
    ds_lock_give(&g->turn);
    if (result != VKR_SUCCESS) return ds_gpu_failed(err, result, g->info.name);
    g->busy |= !turn->more;
    l->before = g->running;
    g->running = l;
    g->work.submissions++;
    g->work.dispatches += (uint64_t)l->n_dispatches;
    g->work.barriers += (uint64_t)l->n_barriers;
    return DS_OK;
}

ds_status ds_gpu_submit_ahead(ds_gpu *g, const ds_gpu_commands *c, ds_error *err) {
    const ds_gpu_script *l = ds_gpu_list_of(c);
    const vk_SubmitInfo info = {.sType = VKS_SUBMIT_INFO, .commandBufferCount = 1, .pCommandBuffers = &l->list};
    if (!l->n) return DS_OK;
    ds_lock_take(&g->turn);
    const vk_Result result = g->v.f.QueueSubmit(g->queue, 1, &info, 0);
    ds_lock_give(&g->turn);
    return result == VKR_SUCCESS ? DS_OK : ds_gpu_failed(err, result, g->info.name);
}

uint64_t ds_gpu_waits(const ds_gpu *g) { return g->n_waits; }

void ds_gpu_drain(ds_gpu *g) {
    ds_lock_take(&g->turn);
    g->v.f.DeviceWaitIdle(g->device);
    ds_lock_give(&g->turn);
    g->running = NULL;
}

ds_status ds_gpu_wait(ds_gpu *g, ds_error *err) {
    if (!g->busy) return DS_OK;
    const int64_t begin = ds_now_ns();
    vk_Result result;
    do result = g->v.f.GetFenceStatus(g->device, g->fence);
    while (result == VKR_NOT_READY && ds_now_ns() - begin < DS_SPIN_NS);
    if (result == VKR_NOT_READY) result = g->v.f.WaitForFences(g->device, 1, &g->fence, 1, UINT64_MAX);
    g->busy = false;
    g->n_waits++;
    g->work.waits++;
    g->work.wait_ns += (uint64_t)(ds_now_ns() - begin);
    for (const ds_gpu_script *l = g->running; l && result == VKR_SUCCESS; l = l->before) ds_gpu_watch_take(g, l);
    g->running = NULL;
    return result == VKR_SUCCESS ? DS_OK : ds_gpu_failed(err, result, g->info.name);
}
