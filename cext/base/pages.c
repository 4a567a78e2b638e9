#define _DEFAULT_SOURCE
#include "base/pages.h"

#include <sys/mman.h>
#include <unistd.h>

/* Ask for huge pages; a kernel or file system without them refuses, which costs nothing. */
static void *advised(void *pages, size_t size) {
    if (pages == MAP_FAILED) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (size >= DS_HUGE_PAGE) {
        madvise(pages, size, MADV_HUGEPAGE);
    }
#endif
    return pages;
}

void *ds_pages_map(int fd, size_t size) { return advised(mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0), size); }

static void *anonymous(size_t size) {
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void *ds_pages_new(size_t size) { return advised(anonymous(size), size); }

void *ds_pages_new_small(size_t size) {
    void *pages = anonymous(size);
    return pages == MAP_FAILED ? NULL : pages;
}

void ds_pages_forget(void *pages, size_t size) { madvise(pages, size, MADV_DONTNEED); }

size_t ds_pages_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

void ds_pages_release(void *pages, size_t size) {
    if (pages) {
        munmap(pages, size);
    }
}
