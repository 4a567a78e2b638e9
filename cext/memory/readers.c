#include "memory/readers.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

/* Read [at, at + n) of the blocks around a piece; false with errno set, or 0 where the file ends before. */
static bool read_blocks(ds_readers *r, const ds_read *read, int64_t at, size_t n, size_t least, unsigned char *to) {
    const ds_file file = read->from.file;
    int64_t got = ds_file_read(file, to, n, at);
    if (got < 0 && errno == EINVAL) { /* opened, but not read past the cache */
        atomic_store(&r->cached,
                     true); /* whoever set it before: others may have been refused together, of other files */
        ds_file_direct(file, false);
        got = ds_file_read(file, to, n, at);
    }
    if (got >= 0 && atomic_load(&r->cached)) ds_file_forget(file, n, at);
    if (got >= 0 && (size_t)got < least) errno = 0;
    return got >= 0 && (size_t)got >= least;
}

static ds_status fail_read(const ds_readers *r, const ds_read *read, ds_error *err) {
    const int code = errno;
    if (!code) {
        ds_fail(err, DS_EIO, "`%s`: the file ends before %zu bytes at %" PRId64 ", which it had when it was opened",
                r->label, read->n, read->from.offset);
        return ds_hint(err, "open it again once it is whole; to replace a model in use, move the new file over the "
                            "old name");
    }
    ds_fail(err, DS_EIO, "`%s`: cannot read %zu bytes at %" PRId64 ": %s", r->label, read->n, read->from.offset,
            strerror(code));
    err->system = code;
    return ds_hint(err, "the drive or its connection fails: look at the system's log, and copy the file elsewhere");
}

/* All of a piece, in parts. */
static ds_status read_piece(ds_readers *r, const ds_read *read, ds_error *err) {
    const int64_t begin = read->from.offset / DS_DIRECT_ALIGN * DS_DIRECT_ALIGN,
                  end = read->from.offset + (int64_t)read->n,
                  blocks_end = (end + DS_DIRECT_ALIGN - 1) / DS_DIRECT_ALIGN * DS_DIRECT_ALIGN;
    for (int64_t at = begin; at < end && !atomic_load(&r->ending); at += DS_READ_BYTES) {
        const int64_t left = blocks_end - at, n = left < DS_READ_BYTES ? left : DS_READ_BYTES,
                      least = end - at < n ? end - at : n;
        if (!read_blocks(r, read, at, (size_t)n, (size_t)least, read->room + (at - begin)))
            return fail_read(r, read, err);
    }
    return atomic_load(&r->ending) ? ds_fail(err, DS_ESTOPPED, "the model is being closed") : DS_OK;
}

static void *work(void *arg) {
    ds_readers *r = arg;
    ds_read read;
    ds_error err;
    ds_lock_take(&r->lock);
    while (!atomic_load(&r->ending)) {
        if (!r->client.next(r->client.ctx, &read)) {
            ds_signal_wait(&r->work, &r->lock);
            continue;
        }
        ds_lock_give(&r->lock);
        const ds_status st = read_piece(r, &read, &err);
        ds_lock_take(&r->lock);
        r->client.done(r->client.ctx, &read, st == DS_OK ? NULL : &err);
        ds_signal_send(&r->news);
    }
    ds_lock_give(&r->lock);
    return NULL;
}

ds_status ds_readers_start(ds_readers *r, ds_readers_client client, const char *label, bool cached, ds_error *err) {
    r->client = client;
    r->label = label;
    r->n_threads = 0;
    r->process = ds_process_id();
    atomic_init(&r->ending, false);
    atomic_init(&r->cached, cached);
    ds_fail(err, DS_ENOMEM, "no memory for the threads that read");
    if (!ds_lock_init(&r->lock)) return err->status;
    if (!ds_signal_init(&r->work)) goto no_work;
    if (!ds_signal_init(&r->news)) goto no_news;
    for (int code = 0; r->n_threads < DS_READERS && code == 0; r->n_threads += code == 0) {
        if ((code = ds_thread_start(work, r, &r->threads[r->n_threads])) != 0)
            ds_fail(err, DS_ENOMEM, "cannot start a thread that reads: %s", strerror(code));
    }
    if (r->n_threads) return DS_OK; /* one is enough to go on with */
    ds_signal_free(&r->news);
no_news:
    ds_signal_free(&r->work);
no_work:
    ds_lock_free(&r->lock);
    return err->status;
}

void ds_readers_stop(ds_readers *r) {
    if (r->process != ds_process_id())
        return; /* a forked child has no threads to wait for, and may find the lock held */
    atomic_store(&r->ending, true);
    ds_lock_take(&r->lock);
    ds_signal_send(&r->work);
    ds_lock_give(&r->lock);
    for (int i = 0; i < r->n_threads; i++) ds_thread_join(r->threads[i]);
    ds_signal_free(&r->news);
    ds_signal_free(&r->work);
    ds_lock_free(&r->lock);
}
