/* share.h: which experts of a prompt a device computes that must be copied to it, beside a processor that computes where they
 * lie: so many that both are done at about the same time, by what both took so far. Knows neither. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Slots: a token for each expert that it chose. */
enum { DS_SHARE_SIZES = 16 };

/* Steps of about as many tokens, within a factor of two: ns a token where experts were shared out, and where all were copied;
 * 0: not known. */
typedef struct ds_share_ways {
    double shared_ns, whole_ns;
    int n_steps; /* since the slower way was tried */
} ds_share_ways;

typedef struct ds_share {
    ds_share_ways ways[DS_SHARE_SIZES];
    double byte_ns; /* of a copy; 0: not known */
    double slot_ns; /* on the device, behind the copies; 0: not known, or nothing */
    /* Sums over the processor's runs, which take about a ns an expert and b a slot: (n_experts n_experts), (n_experts
     * n_slots), (n_slots n_slots), (n_experts ns), (n_slots ns); the older the less. */
    double ee, es, ss, et, st;
} ds_share;

void ds_share_copied(ds_share *share, uint64_t bytes, uint64_t ns);
/* waited: whether somebody waited for the device; else it was done before, who knows when. */
void ds_share_device(ds_share *share, uint64_t n_slots, uint64_t ns, bool waited);
void ds_share_processor(ds_share *share, uint64_t n_experts, uint64_t n_slots, uint64_t ns);

/* How many of n experts, which have counts (n) of slots in falling order, go to the device, the first: it has n_slots of
 * others and under_way bytes to copy before. Half of them where something is not known. expert_bytes of each. */
int ds_share_choose(const ds_share *share, const int *counts, int n, uint64_t expert_bytes, uint64_t under_way,
                    uint64_t n_slots);
/* Whoever gets none for long is thought to be a little faster each time, so that it is tried again. */
void ds_share_chosen(ds_share *share, bool device, bool processor);
/* Whether a step has all copied: what took less in steps of about as many tokens, each way tried once, and the slower one
 * again from time to time. Shared out first, by which rates are known; and always where the link would be slower than a
 * processor that computes all n experts of a layer, with n_slots. */
bool ds_share_whole(ds_share *share, int n_tok, int n, uint64_t n_slots, uint64_t expert_bytes);
/* What such a step took. */
void ds_share_step(ds_share *share, int n_tok, bool whole, uint64_t ns);
/* Slots of an expert from which on copying it takes less than computing it where it lies; 0: not known. */
double ds_share_crossing(const ds_share *share, uint64_t expert_bytes);
