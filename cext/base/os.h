/* os.h: all that the engine asks of an operating system, named once. os_posix.c answers for any POSIX system, os_linux.c
 * and os_apple.c what these two have of their own; another system is another file. Nothing above includes a system's
 * headers (tests/house/test_layout.py). */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- Threads ---- */

typedef pthread_mutex_t ds_lock;
typedef pthread_cond_t ds_signal;
typedef pthread_t ds_thread;

/* False where the system refuses; a lock or signal made is freed once. */
bool ds_lock_init(ds_lock *lock);
void ds_lock_free(ds_lock *lock);
void ds_lock_take(ds_lock *lock);
void ds_lock_give(ds_lock *lock);

bool ds_signal_init(ds_signal *signal);
void ds_signal_free(ds_signal *signal);
/* Give the lock, sleep until the signal is sent, take it again; may wake for nothing. */
void ds_signal_wait(ds_signal *signal, ds_lock *lock);
/* The same, for about so long at most. */
void ds_signal_wait_for(ds_signal *signal, ds_lock *lock, int64_t ns);
void ds_signal_send(ds_signal *signal); /* to all who wait */

/* Run start(arg) beside the caller; no system signal (Ctrl-C) lands on it. 0, or the system's error number. */
int ds_thread_start(void *(*start)(void *arg), void *arg, ds_thread *out);
void ds_thread_join(ds_thread thread);

#if defined(__linux__)
#define DS_OS_WORDS 1 /* threads can sleep on a word of memory */
/* Sleep while the word is `old`; may wake for nothing. */
void ds_word_sleep(_Atomic uint32_t *word, uint32_t old);
void ds_word_wake(_Atomic uint32_t *word); /* all who sleep on it */
#endif

int64_t ds_now_ns(void); /* of a clock that never goes back */
int64_t ds_process_id(void); /* another one in a forked child */

/* ---- The processor ---- */

/* Processors that run; at least 1. */
int ds_os_processors(void);
/* Cores at full speed that this process may use: physical cores within its affinity mask and its group's quota; at least
 * 1. */
int ds_os_cores(void);
/* ARM's dot products (8.2) and matrix products (8.6) of bytes; false where the system does not tell. */
bool ds_os_has_dotprod(void);
bool ds_os_has_i8mm(void);

/* ---- Libraries ---- */

/* A library of the system's, by the name that its loader knows; NULL where there is none. */
void *ds_library_open(const char *name);
void ds_library_close(void *library);
/* What it has under a name, as a function; NULL where it has nothing. */
void (*ds_library_symbol(void *library, const char *name))(void);

/* ---- Files ---- */

typedef intptr_t ds_file;

typedef enum ds_file_kind { DS_FILE_REGULAR, DS_FILE_FOLDER, DS_FILE_OTHER } ds_file_kind;

/* What a file is, and whether it is still what it was. */
typedef struct ds_file_stamp {
    ds_file_kind kind;
    int64_t size, seconds, nanoseconds; /* bytes, and when its content was last written */
} ds_file_stamp;

/* Open for reading; waits for nobody, whatever the name stands for. False with errno set. */
bool ds_file_open(const char *path, ds_file *out);
void ds_file_close(ds_file file);
/* What an open file is now; false with errno set where the system does not tell. */
bool ds_file_stamp_get(ds_file file, ds_file_stamp *out);
bool ds_file_stamp_equal(const ds_file_stamp *a, const ds_file_stamp *b);

/* Reads of a file past the system's cache, which a file larger than memory would push everything else out of. */

enum { DS_DIRECT_ALIGN = 4096 }; /* of offset, length and memory of such a read: what no drive or file system exceeds */

/* Have reads of an open file go past the cache, or through it again. False where the file system refuses. */
bool ds_file_direct(ds_file file, bool on);
/* Read n bytes at an offset. What was read: less than n where the file ends; -1 with errno set where it fails. */
int64_t ds_file_read(ds_file file, void *to, size_t n, int64_t offset);
/* Have reads through the cache bring in what is asked for and no more: pages read ahead are not forgotten with those that
 * were asked for, as they may lie in larger pieces or be another thread's. */
void ds_file_sparse(ds_file file);
/* Let the cache forget what it has of n bytes at an offset. */
void ds_file_forget(ds_file file, size_t n, int64_t offset);

/* ---- Pages ----
 * Reads of a model are bound by memory, and every 4 KiB page needs its own address translation; with pages of 2 MiB a core
 * reads a file some 20 % faster, and a cold file comes from disk in larger pieces. */

enum { DS_HUGE_PAGE = 2 << 20 };

/* Map size bytes of an open file read-only, shared with other processes; NULL with errno set where that fails. */
void *ds_pages_map(ds_file file, size_t size);
/* Of a mapping that is read here and there and not as a whole: no pages ahead, none larger than usual, none kept so far. */
void ds_pages_sparse(void *pages, size_t size);
/* Have some of such a mapping lie in huge pages of memory and no more in the file's, which may be small ones: the same bytes
 * at the same addresses for who reads them meanwhile. pages, size: multiples of DS_HUGE_PAGE; offset: theirs in the file.
 * False with errno set, and all as it was, where that fails: ENOSYS where the system has no way to. */
bool ds_pages_settle(ds_file file, void *pages, size_t size, int64_t offset);
/* size zeroed bytes that take memory once they are touched; NULL with errno set where that fails. */
void *ds_pages_new(size_t size);
/* The same in pages of the usual size: for pieces much smaller than a huge page, each of which would take a whole one. */
void *ds_pages_new_small(size_t size);
/* Give the memory of whole pages back to the system; they stay mapped, with unspecified bytes. */
void ds_pages_forget(void *pages, size_t size);
size_t ds_pages_size(void); /* of a usual page */
/* Give back what one of the first three returned. */
void ds_pages_release(void *pages, size_t size);
