/* session.c: sequences of a model's tokens: their caches and positions, what they share, and what is kept of them outside of
 * memory. */
#include "model/session.h"

#include <stdlib.h>

#include "dsv2.h"

enum { DS_MAX_CONTEXT = 1 << 24 };

_Static_assert((int)DS_SESSION_BLOCK == (int)DS_KV_BLOCK, "a block of the public interface is one of the cache");

/* A session around a cache, which is taken: it is released on failure. */
static ds_status session_of(ds_model *model, ds_kv *kv, int n_past, ds_session **out, ds_error *err) {
    ds_session *session = malloc(sizeof *session);
    if (!session) {
        ds_kv_release(kv);
        return ds_fail(err, DS_ENOMEM, "no memory for a session");
    }
    *session = (ds_session){.model = model, .kv = *kv, .n_past = n_past};
    atomic_fetch_add(&model->holders, 1);
    *out = session;
    return DS_OK;
}

ds_status ds_session_check(const ds_session *session, ds_error *err) {
    ds_status st = ds_core_check(&session->model->core, err);
    if (st != DS_OK || !session->is_read) return st;
    return ds_fail(err, DS_EINVAL, "tokens are being read into the session, some layers at a time");
}

ds_status ds_session_create(ds_model *model, int n_ctx, const char *kv_type, ds_session **out, ds_error *err) {
    ds_kv_type type;
    ds_kv kv;
    ds_status st;
    if (!ds_kv_type_from_name(kv_type, &type))
        return ds_fail(err, DS_EINVAL, "cache type `%s` is not one of f16, q8_0, f32", kv_type);
    if (n_ctx < 1 || n_ctx > DS_MAX_CONTEXT)
        return ds_fail(err, DS_EINVAL, "a context of %d tokens: expected 1 to %d", n_ctx, DS_MAX_CONTEXT);
    if ((st = ds_kv_create(&model->stores[type], n_ctx, &kv, err)) != DS_OK) return st;
    return session_of(model, &kv, 0, out, err);
}

ds_status ds_session_fork(const ds_session *session, int n, ds_session **out, ds_error *err) {
    ds_kv kv;
    ds_status st = ds_core_check(&session->model->core, err);
    if (st != DS_OK) return st;
    if (n < 0 || n > session->n_past)
        return ds_fail(err, DS_EINVAL, "cannot fork after %d tokens: the session holds %d", n, session->n_past);
    if ((st = ds_kv_fork(&session->kv, n, &kv, err)) != DS_OK) return st;
    return session_of(session->model, &kv, n, out, err);
}

void ds_session_destroy(ds_session *session) {
    if (!session) return;
    ds_kv_release(&session->kv);
    ds_model_close(session->model);
    free(session);
}

int ds_session_n_past(const ds_session *session) { return session->n_past; }
int ds_session_n_ctx(const ds_session *session) { return session->kv.n_ctx; }
size_t ds_session_bytes(const ds_session *session) { return ds_kv_bytes(session->kv.store, session->kv.n_ctx); }
const char *ds_session_kv_type(const ds_session *session) { return ds_kv_type_name(session->kv.store->type); }

ds_status ds_session_rewind(ds_session *session, int n, ds_error *err) {
    ds_status st = ds_session_check(session, err);
    if (st != DS_OK) return st;
    if (n < 0 || n > session->n_past)
        return ds_fail(err, DS_EINVAL, "cannot rewind to %d tokens: the session holds %d", n, session->n_past);
    session->n_past = n;
    ds_kv_truncate(&session->kv, n);
    return DS_OK;
}

ds_status ds_session_repeat(ds_session *session, int n, ds_error *err) {
    ds_status st = ds_session_check(session, err);
    if (st != DS_OK) return st;
    if (session->n_past < 1) return ds_fail(err, DS_EINVAL, "nothing to repeat: the session is empty");
    if (n < session->n_past || n > session->kv.n_ctx) {
        return ds_fail(err, DS_EINVAL, "cannot repeat up to %d tokens: the session holds %d, and %d fit", n,
                       session->n_past, session->kv.n_ctx);
    }
    if ((st = ds_kv_reserve(&session->kv, session->n_past, n, err)) != DS_OK) return st;
    ds_kv_repeat(&session->kv, session->n_past, n);
    session->n_past = n;
    return DS_OK;
}

void ds_session_ids(const ds_session *session, int32_t *out) {
    for (int pos = 0; pos < session->n_past; pos++) out[pos] = *ds_kv_ids(&session->kv, pos);
}

size_t ds_session_block_bytes(const ds_session *session) { return session->kv.store->block_bytes; }

ds_status ds_session_block_save(const ds_session *session, int block, unsigned char *out, ds_error *err) {
    if (block < 0 || block >= session->kv.n_blocks)
        return ds_fail(err, DS_EINVAL, "block %d of a session that holds %d", block, session->kv.n_blocks);
    const int left = session->n_past - block * DS_KV_BLOCK;
    ds_kv_block_save(&session->kv, block, left < DS_KV_BLOCK ? left : DS_KV_BLOCK, out);
    return DS_OK;
}

ds_status ds_session_block_load(ds_session *session, const unsigned char *content, int n, ds_error *err) {
    const int n_vocab = session->model->core.config.n_vocab;
    ds_status st = ds_session_check(session, err);
    if (st != DS_OK) return st;
    if (session->n_past % DS_KV_BLOCK || n < 1 || n > DS_KV_BLOCK || n > session->kv.n_ctx - session->n_past) {
        return ds_fail(err, DS_EINVAL, "a block of %d tokens behind %d, in a context of %d", n, session->n_past,
                       session->kv.n_ctx);
    }
    if ((st = ds_kv_block_load(&session->kv, content, err)) != DS_OK) return st;
    for (int i = 0; i < n; i++) {
        const int32_t id = ds_kv_ids(&session->kv, session->n_past)[i];
        if (id >= 0 && id < n_vocab) continue;
        ds_kv_truncate(&session->kv, session->n_past);
        return ds_fail(err, DS_EFORMAT, "a saved token has id %d, expected 0 to %d", id, n_vocab - 1);
    }
    session->n_past += n;
    return DS_OK;
}
