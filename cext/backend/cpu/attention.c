/* attention.c: the operations of attention, handed to the model's kind. */
#include "backend/cpu/attention.h"

const ds_cpu_attention_kind *ds_cpu_attention_of(const ds_config *c) {
    static const ds_cpu_attention_kind *const KINDS[DS_ATTENTION_KINDS] = {[DS_ATTENTION_LATENT] =
                                                                               &DS_CPU_LATENT_ATTENTION};
    return KINDS[c->attention];
}

bool ds_cpu_remember(const ds_lane *lane, const ds_op *op) {
    ds_cpu_attention_of(lane->step->config)->remember(lane, ds_weights_layer(lane->step->weights, op->il), op->il);
    return true;
}

bool ds_cpu_attention(const ds_lane *lane, const ds_op *op) {
    ds_cpu_attention_of(lane->step->config)->attend(lane, ds_weights_layer(lane->step->weights, op->il), op->il);
    return true;
}
