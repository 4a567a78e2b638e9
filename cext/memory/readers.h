/* readers.h: a few threads that read pieces of files past the system's cache. Owns the threads, a lock and a signal; what
 * is read next and what becomes of it is their client's, who is asked with the lock held. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>

#include "base/os.h"
#include "gguf/gguf.h"

enum {
    DS_READERS = 4, /* a drive is busy with two reads of some MB; more hide what the threads themselves take */
    DS_READ_BYTES = 1 << 20, /* at once: between two such pieces a thread hears that it is to end */
};

/* The memory for `bytes` bytes of a file that begin at any offset, when they are read in whole blocks. */
static inline size_t ds_read_room(size_t bytes) {
    return (bytes + DS_DIRECT_ALIGN - 1) / DS_DIRECT_ALIGN * DS_DIRECT_ALIGN + DS_DIRECT_ALIGN;
}

/* n bytes of a file into memory that is aligned to DS_DIRECT_ALIGN and has ds_read_room(n). */
typedef struct ds_read {
    ds_gguf_place from;
    size_t n;
    unsigned char *room;
    int tag; /* the client's */
} ds_read;

/* Where the first of the bytes will be. */
static inline unsigned char *ds_read_data(unsigned char *room, const ds_gguf_place *from) {
    return room + from->offset % DS_DIRECT_ALIGN;
}

typedef struct ds_readers_client {
    /* What to read now; false where there is nothing. */
    bool (*next)(void *ctx, ds_read *out);
    /* It was read, or failed with that error; err is NULL where it was read. */
    void (*done)(void *ctx, const ds_read *read, const ds_error *err);
    void *ctx;
} ds_readers_client;

typedef struct ds_readers {
    ds_readers_client client;
    const char *label; /* of the file, for errors */
    ds_lock lock;
    ds_signal work; /* there is something to read */
    ds_signal news; /* something was read */
    ds_thread threads[DS_READERS];
    int n_threads;
    int64_t process; /* that has the threads */
    atomic_bool ending;
    atomic_bool cached; /* a file system would not have it otherwise, of one of the files at least */
} ds_readers;

/* In place: it is not to be moved. */
ds_status ds_readers_start(ds_readers *readers, ds_readers_client client, const char *label, bool cached,
                           ds_error *err);
/* After what is being read now, up to DS_READ_BYTES a thread. */
void ds_readers_stop(ds_readers *readers);
