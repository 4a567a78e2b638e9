#include "model/placement.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"

static const char *const PARTS[DS_PART_COUNT] = {"the ends", "attention", "feed-forward", "experts"};

static ds_status check(const ds_config *c, const ds_weights *w, const ds_placement *p, int i, ds_error *err) {
    const ds_rule *r = &p->rules[i];
    if ((int)r->part < 0 || r->part >= DS_PART_COUNT)
        return ds_fail(err, DS_EINVAL, "placement %d: there is no part %d of a model", i, (int)r->part);
    const char *part = PARTS[r->part];
    if (r->device < 0 || r->device > p->n_devices)
        return ds_fail(err, DS_EINVAL, "placement %d (%s): device %d, expected 0 to %d", i, part, r->device,
                       p->n_devices);
    if (r->part == DS_PART_ENDS) return DS_OK;
    const int begin =
        r->part == DS_PART_EXPERTS && c->n_layer_dense > w->layer_begin ? c->n_layer_dense : w->layer_begin;
    if (r->layer_begin < begin || r->layer_end > w->layer_end || r->layer_begin >= r->layer_end)
        return ds_fail(err, DS_EINVAL, "placement %d: %s of layers %d to %d, the model has them in %d to %d", i, part,
                       r->layer_begin, r->layer_end - 1, begin, w->layer_end - 1);
    if (r->part == DS_PART_EXPERTS &&
        (r->expert_begin < 0 || r->expert_end > c->n_expert || r->expert_begin >= r->expert_end))
        return ds_fail(err, DS_EINVAL, "placement %d: experts %d to %d of a layer, expected some of 0 to %d", i,
                       r->expert_begin, r->expert_end - 1, c->n_expert - 1);
    return DS_OK;
}

static void carry_out(const ds_rule *r, ds_residency *residency, ds_places *p) {
    if (r->part == DS_PART_ENDS) p->ends = (uint8_t)r->device;
    for (int il = r->layer_begin; r->part != DS_PART_ENDS && il < r->layer_end; il++) {
        const int at = il - residency->weights->layer_begin;
        int begin = r->expert_begin, end = r->expert_end;
        if (r->part == DS_PART_ATTENTION) p->attention[at] = (uint8_t)r->device;
        if (r->part == DS_PART_FEED_FORWARD)
            p->feed_forward[at] = (uint8_t)r->device, begin = 0, end = residency->n_expert;
        for (int e = begin; r->part != DS_PART_ATTENTION && e < end; e++)
            ds_residency_place(residency, il)[e] = (uint8_t)r->device;
    }
}

/* Whether a part, of layer il unless it is the ends, is on a device with memory of its own. */
static bool is_copied(const ds_placement *p, ds_part part, int il) {
    int device = 0;
    for (int i = 0; i < p->n_rules; i++) {
        const ds_rule *r = &p->rules[i];
        if (r->part == part && (part == DS_PART_ENDS || (r->layer_begin <= il && il < r->layer_end)))
            device = r->device;
    }
    return device > 0 && device <= p->n_devices && ds_device_copies(&p->devices[device - 1]);
}

bool ds_placement_takes(const void *placement, const char *name) {
    const ds_placement *p = placement;
    int il = 0, at = 0;
    if (!p || strstr(name, "_norm.") || strstr(name, "_gate_inp.") || strstr(name, "_exps.")) return false;
    if (strcmp(name, "output.weight") == 0) return is_copied(p, DS_PART_ENDS, 0);
    if (sscanf(name, "blk.%d.%n", &il, &at) != 1 || !at) return false;
    if (strncmp(name + at, "attn_", 5) == 0) return is_copied(p, DS_PART_ATTENTION, il);
    return strncmp(name + at, "ffn_", 4) == 0 && is_copied(p, DS_PART_FEED_FORWARD, il);
}

ds_status ds_places_create(const ds_config *config, const ds_placement *placement, ds_residency *residency,
                           ds_places *out, ds_error *err) {
    if (placement && placement->n_devices >= DS_MAX_BACKENDS)
        return ds_fail(err, DS_EINVAL, "%d devices, expected at most %d", 1 + placement->n_devices, DS_MAX_BACKENDS);
    const size_t n_layer = (size_t)(residency->weights->layer_end - residency->weights->layer_begin);
    ds_places p = {.attention = calloc(n_layer, 1),
                   .feed_forward = calloc(n_layer, 1),
                   .helpers = calloc(n_layer, sizeof *p.helpers)};
    ds_status st =
        p.attention && p.feed_forward && p.helpers ? DS_OK : ds_fail(err, DS_ENOMEM, "no memory for a placement");
    for (int i = 0; placement && i < placement->n_rules && st == DS_OK; i++) {
        if ((st = check(config, residency->weights, placement, i, err)) == DS_OK)
            carry_out(&placement->rules[i], residency, &p);
    }
    for (size_t l = 0; l < n_layer && st == DS_OK; l++) {
        const uint8_t *place = residency->place + l * (size_t)config->n_expert;
        for (int e = 0; e < config->n_expert; e++)
            if (place[e] != p.feed_forward[l]) p.helpers[l] |= 1u << place[e];
    }
    if (st == DS_OK) *out = p;
    else ds_places_release(&p);
    return st;
}

void ds_places_release(ds_places *places) {
    free(places->attention);
    free(places->feed_forward);
    free(places->helpers);
    *places = (ds_places){0};
}
