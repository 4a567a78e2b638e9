/* os_posix.c: threads, files and pages of a POSIX system. */
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "base/os.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

bool ds_lock_init(ds_lock *lock) { return pthread_mutex_init(lock, NULL) == 0; }
void ds_lock_free(ds_lock *lock) { pthread_mutex_destroy(lock); }
void ds_lock_take(ds_lock *lock) { pthread_mutex_lock(lock); }
void ds_lock_give(ds_lock *lock) { pthread_mutex_unlock(lock); }

bool ds_signal_init(ds_signal *signal) { return pthread_cond_init(signal, NULL) == 0; }
void ds_signal_free(ds_signal *signal) { pthread_cond_destroy(signal); }
void ds_signal_wait(ds_signal *signal, ds_lock *lock) { pthread_cond_wait(signal, lock); }
void ds_signal_wait_for(ds_signal *signal, ds_lock *lock, int64_t ns) {
    struct timespec until; /* the wall's clock: the only one that every system waits by */
    clock_gettime(CLOCK_REALTIME, &until);
    ns += until.tv_nsec;
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_cond_timedwait(signal, lock, &until);
}
void ds_signal_send(ds_signal *signal) { pthread_cond_broadcast(signal); }

int ds_thread_start(void *(*start)(void *arg), void *arg, ds_thread *out) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int code = pthread_create(out, NULL, start, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code;
}

void ds_thread_join(ds_thread thread) { pthread_join(thread, NULL); }

int64_t ds_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t ds_process_id(void) { return getpid(); }

int ds_os_processors(void) {
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

void *ds_library_open(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
void ds_library_close(void *library) { dlclose(library); }
void (*ds_library_symbol(void *library, const char *name))(void) {
    void (*function)(void) = NULL;
    *(void **)(void *)&function = dlsym(library, name); /* ISO C has no other way from an object to a function */
    return function;
}

bool ds_file_open(const char *path, ds_file *out) {
    /* O_NONBLOCK: opening a named pipe must not wait for a writer. */
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) *out = fd;
    return fd >= 0;
}

void ds_file_close(ds_file file) { close((int)file); }

bool ds_file_stamp_get(ds_file file, ds_file_stamp *out) {
    struct stat info;
    if (fstat((int)file, &info) != 0) return false;
#if defined(__APPLE__)
    const struct timespec written = info.st_mtimespec;
#else
    const struct timespec written = info.st_mtim;
#endif
    const ds_file_kind kind = S_ISREG(info.st_mode)   ? DS_FILE_REGULAR
                              : S_ISDIR(info.st_mode) ? DS_FILE_FOLDER
                                                      : DS_FILE_OTHER;
    *out = (ds_file_stamp){kind, info.st_size, written.tv_sec, written.tv_nsec};
    return true;
}

bool ds_file_stamp_equal(const ds_file_stamp *a, const ds_file_stamp *b) {
    return a->kind == b->kind && a->size == b->size && a->seconds == b->seconds && a->nanoseconds == b->nanoseconds;
}

int64_t ds_file_read(ds_file file, void *to, size_t n, int64_t offset) {
    size_t done = 0;
    while (done < n) {
        const ssize_t got = pread((int)file, (char *)to + done, n - done, (off_t)(offset + (int64_t)done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += (size_t)got;
        if (done % DS_DIRECT_ALIGN) break; /* the end of the file: a read past the cache cannot go on from here */
    }
    return (int64_t)done;
}

#if !defined(__APPLE__)
void ds_file_sparse(ds_file file) { posix_fadvise((int)file, 0, 0, POSIX_FADV_RANDOM); }

void ds_file_forget(ds_file file, size_t n, int64_t offset) {
    posix_fadvise((int)file, (off_t)offset, (off_t)n, POSIX_FADV_DONTNEED);
}
#endif

/* Ask for huge pages; a kernel or file system without them refuses, which costs nothing. */
static void *advised(void *pages, size_t size) {
#ifdef MADV_HUGEPAGE
    if (pages && size >= DS_HUGE_PAGE) madvise(pages, size, MADV_HUGEPAGE);
#endif
    return pages;
}

static void *mapped(void *pages) { return pages == MAP_FAILED ? NULL : pages; }

void *ds_pages_map(ds_file file, size_t size) {
    return advised(mapped(mmap(NULL, size, PROT_READ, MAP_SHARED, (int)file, 0)), size);
}

void ds_pages_sparse(void *pages, size_t size) {
#ifdef MADV_NOHUGEPAGE
    madvise(pages, size, MADV_NOHUGEPAGE);
#endif
    madvise(pages, size, MADV_RANDOM);
    madvise(pages, size, MADV_DONTNEED); /* read-only pages of a file: they come back as they were */
}

void *ds_pages_new_small(size_t size) {
    return mapped(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void *ds_pages_new(size_t size) { return advised(ds_pages_new_small(size), size); }

void ds_pages_forget(void *pages, size_t size) {
#if defined(__linux__)
    madvise(pages, size, MADV_DONTNEED);
#else /* elsewhere that is a hint, which macOS does not follow for memory: map it anew in its own place */
    mmap(pages, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
#endif
}

size_t ds_pages_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

void ds_pages_release(void *pages, size_t size) {
    if (pages) munmap(pages, size);
}

#if !defined(__linux__)
bool ds_pages_settle(ds_file file, void *pages, size_t size, int64_t offset) {
    (void)file, (void)pages, (void)size, (void)offset;
    errno = ENOSYS;
    return false;
}
#endif

#if !defined(__linux__) && !defined(__APPLE__)
int ds_os_cores(void) { return ds_os_processors(); }
bool ds_file_direct(ds_file file, bool on) { return !on; }
bool ds_os_has_dotprod(void) { return false; }
bool ds_os_has_i8mm(void) { return false; }
#endif
