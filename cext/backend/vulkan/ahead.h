/* ahead.h: routed experts that lie in the host's memory, computed by the device for prompts: copied to it through two slots, of
 * a layer each. While one layer is computed the next one's are copied, before its router has chosen; what of it is not there
 * when it has is shared out between the device, which gets more copied, and the processor, which computes where they lie.
 * Of long steps, where that is faster, all are copied whatever is chosen: then the device makes its own plan, all layers' lists
 * are submitted at once, each behind its copies, and a slot's next copies behind the list that reads it.
 * Owns the slots; experts that lie on the device for good are not touched. */
#pragma once

#include "backend/backend.h"
#include "backend/device.h"
#include "backend/vulkan/gpu.h"
#include "backend/vulkan/weights.h"

typedef struct ds_ahead ds_ahead;

/* room: bytes of the device that slots may take. *out is NULL where nothing is to be copied, or there is no room for two. */
ds_status ds_ahead_create(ds_gpu *gpu, const ds_facts *facts, int number, uint64_t room, ds_copying mode,
                          ds_ahead **out, ds_error *err);
void ds_ahead_destroy(ds_ahead *ahead);
/* Bytes of the device that the slots take. */
uint64_t ds_ahead_bytes(const ds_ahead *ahead);

/* A step, or a layer of a piece of one, begins. */
void ds_ahead_begin(ds_ahead *ahead, const ds_request *whole, const ds_request *tail);
/* Take over experts of a layer whose owner is the processor: they are there, or will be when ds_ahead_submit's list runs. */
void ds_ahead_share(ds_ahead *ahead, int il, const ds_plan *plan, uint8_t *owner);
/* Where an expert lies in a slot that was taken over. */
ds_gpu_expert ds_ahead_expert(const ds_ahead *ahead, int il, int e);
/* Whether all of a layer's experts are computed here in this step, of which n_tok tokens go through it, without a plan. */
bool ds_ahead_takes(const ds_ahead *ahead, int il, int n_tok);
/* Such a layer is in the list that is told: its experts have places from here on. */
void ds_ahead_take(ds_ahead *ahead, int il);
/* Submit that list, or one before the first such, behind the copies that it needs; more: another one follows it.
 * Returns its number. */
uint64_t ds_ahead_then(ds_ahead *ahead, ds_gpu_script *list, bool more);
/* Submit a last list behind the copies that it needs, later: then it is ds_ahead_wait's to wait for. False where it needs none,
 * and nothing was done. */
bool ds_ahead_submit(ds_ahead *ahead, ds_gpu_script *list);
/* Until the list of that number has run, of those that others follow. */
ds_status ds_ahead_reached(ds_ahead *ahead, uint64_t number, ds_error *err);
/* What is under way ends here, where something failed. */
void ds_ahead_abandon(ds_ahead *ahead);
/* A run of the step's operations is over. */
void ds_ahead_ended(ds_ahead *ahead);
/* Until that list has run. */
ds_status ds_ahead_wait(ds_ahead *ahead, ds_error *err);
/* What the processor took for its part of the layer that was shared last. */
void ds_ahead_measure(ds_ahead *ahead, const ds_split *split);

void ds_ahead_watch(ds_ahead *ahead);
void ds_ahead_watched(const ds_ahead *ahead, ds_work *work);
