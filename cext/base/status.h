/* status.h: how the library says that something went wrong. Owns no state: every call that can fail takes a
 * ds_error to fill. Nothing in the library prints, exits or aborts. */
#pragma once

typedef enum ds_status {
    DS_OK = 0,
    DS_ENOMEM,        /* the system refused memory */
    DS_EIO,           /* a file could not be opened, mapped or read */
    DS_EFORMAT,       /* a file is not what it claims: truncated, overlapping, wrong shape or type */
    DS_EUNSUPPORTED,  /* well-formed, but not something this build runs */
    DS_EINVAL,        /* the caller's argument */
    DS_ECONTEXT,      /* more tokens than the context holds */
    DS_ESTOPPED,      /* the caller had it stopped */
    DS_EDEVICE,       /* a device that computes is not there, cannot be used, or failed */
} ds_status;

typedef struct ds_error {
    ds_status status;
    int system;        /* the system's number (errno) for the call that it refused, or 0 */
    char message[512]; /* what, where, which value */
    char hint[256];    /* what to do about it, or "" */
} ds_error;

/* Fill err and return status: `return ds_fail(err, DS_EFORMAT, "%s: %u dims, expected 2", name, nd);` */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
ds_status
ds_fail(ds_error *err, ds_status status, const char *format, ...);

/* Add a remedy to an error that has been filled; returns its status, so that it can close a return. */
ds_status ds_hint(ds_error *err, const char *hint);
