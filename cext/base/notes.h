/* notes.h: what the library has to say beside a result: an assumption made, a part left out. Told once by the caller. */
#pragma once

enum { DS_MAX_NOTES = 12, DS_NOTE_BYTES = 320 };

typedef struct ds_notes {
    int n;
    char text[DS_MAX_NOTES][DS_NOTE_BYTES]; /* (n) sentences without a full stop, printable */
} ds_notes;

/* Add a sentence; one more than DS_MAX_NOTES is dropped. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void ds_note(ds_notes *notes, const char *format, ...);
