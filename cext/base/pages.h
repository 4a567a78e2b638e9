/* pages.h: memory by the page. Reads of a model are bound by memory, and every 4 KiB page needs its own address translation;
 * with pages of 2 MiB a core reads a file some 20 % faster, and a cold file comes from disk in larger pieces. */
#pragma once

#include <stddef.h>

enum { DS_HUGE_PAGE = 2 << 20 };

/* Map size bytes of an open file read-only, shared with other processes; NULL with errno set where that fails. */
void *ds_pages_map(int fd, size_t size);
/* size zeroed bytes that take memory once they are touched; NULL with errno set where that fails. */
void *ds_pages_new(size_t size);
/* The same in pages of the usual size: for pieces much smaller than a huge page, each of which would take a whole one. */
void *ds_pages_new_small(size_t size);
/* Give the memory of whole pages back to the system; they stay mapped, with unspecified bytes. */
void ds_pages_forget(void *pages, size_t size);
size_t ds_pages_size(void); /* of a usual page */
/* Give back what one of the first three returned. */
void ds_pages_release(void *pages, size_t size);
