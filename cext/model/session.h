/* session.h: what a model and its sessions are, for the files that implement them. */
#pragma once

#include <stdatomic.h>

#include "memory/kv.h"
#include "model/core.h"

struct ds_model {
    ds_core core;
    ds_gguf *gguf;
    ds_kv_store stores[DS_KV_TYPES];
    ds_budget budget; /* the caller's */
    atomic_int holders; /* who opened it, and its sessions */
};

struct ds_session {
    struct ds_model *model;
    ds_kv kv;
    int n_past;
    bool is_read; /* a ds_reading appends to it */
};

/* Whether it may be changed: DS_EINVAL in a forked process, and while tokens are read into it. */
ds_status ds_session_check(const struct ds_session *session, ds_error *err);
