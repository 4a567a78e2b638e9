/* model.c: models and sessions. The GIL is released around every step; Python keeps two threads out of one session. */
#include "arch/attention.h"
#include "python/py.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static void release_model(void *model) { ds_model_close(model); }
static void release_session(void *session) { ds_session_destroy(session); }

/* Text of a file, which may be cut inside a character or be no UTF-8. */
static PyObject *file_text(void *text) {
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "surrogateescape");
}

PyObject *ds_py_config(const ds_config *c) {
    return Py_BuildValue(
        "{s:s,s:O&,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:d,s:O,s:s,s:d,s:d,"
        "s:d,s:i,s:d,s:d,s:i,s:d,s:d}",
        "arch", c->arch, "name", file_text, (void *)c->name, "attention", ds_attention(c)->name, "n_layer", c->n_layer,
        "n_ctx_train", c->n_ctx_train, "n_embd", c->n_embd, "n_vocab", c->n_vocab, "n_head", c->n_head, "n_head_kv",
        c->n_head_kv, "q_lora_rank", c->q_lora_rank, "kv_lora_rank", c->kv_lora_rank, "qk_nope_head_dim", c->nope_dim,
        "qk_rope_head_dim", c->rope_dim, "v_head_dim", c->v_dim, "n_ff_dense", c->n_ff_dense, "n_layer_dense",
        c->n_layer_dense, "n_expert", c->n_expert, "n_expert_used", c->n_expert_used, "n_expert_shared",
        c->n_expert_shared, "n_ff_expert", c->n_ff_expert, "n_expert_group", c->n_group, "n_expert_group_used",
        c->n_group_used, "expert_weights_scale", (double)c->expert_scale, "expert_weights_norm",
        c->expert_norm ? Py_True : Py_False, "expert_gating", c->gating == DS_GATING_SIGMOID ? "sigmoid" : "softmax",
        "rms_norm_eps", (double)c->rms_eps, "rope_freq_base", (double)c->rope_base, "rope_scaling_factor",
        (double)c->rope_factor, "rope_orig_ctx", c->rope_orig_ctx, "attention_scale", (double)c->attn_scale,
        "attention_temperature_scale", (double)c->attn_temp_scale, "attention_temperature_length", c->attn_temp_length,
        "rope_beta_fast", (double)c->rope_beta_fast, "rope_beta_slow", (double)c->rope_beta_slow);
}

PyObject *ds_py_notes(const ds_notes *notes) {
    PyObject *tuple = PyTuple_New(notes->n);
    for (int i = 0; tuple && i < notes->n; i++) {
        PyObject *text = PyUnicode_DecodeUTF8(notes->text[i], (Py_ssize_t)strlen(notes->text[i]), "replace");
        if (!text) Py_CLEAR(tuple);
        else PyTuple_SetItem(tuple, i, text);
    }
    return tuple;
}

/* A placement from [(kind, threads, isa, name, memory, copies, hot, short steps)] and [(part, device, layer begin, end, expert begin, end)], tuples of the caller's
 * own. Its arrays are the caller's to free; false with an exception. */
static bool read_placement(PyObject *devices, PyObject *rules, ds_placement *out) {
    const Py_ssize_t n_devices = PyTuple_Size(devices), n_rules = PyTuple_Size(rules);
    ds_device *device = calloc((size_t)n_devices + 1, sizeof *device);
    ds_rule *rule = calloc((size_t)n_rules + 1, sizeof *rule);
    bool ok = device && rule;
    *out = (ds_placement){device, (int)n_devices, rule, (int)n_rules};
    if (!ok) PyErr_NoMemory();
    for (Py_ssize_t i = 0; ok && i < n_devices; i++) {
        ds_device *d = &device[i];
        unsigned long long memory = 0, hot = 0;
        int copying = 0, short_steps = 0;
        ok = PyArg_ParseTuple(PyTuple_GetItem(devices, i), "sizzKiKp", &d->kind, &d->n_threads, &d->isa, &d->name,
                              &memory, &copying, &hot, &short_steps);
        d->short_steps = short_steps;
        d->memory = memory, d->hot = hot;
        d->copying = (ds_copying)copying;
    }
    for (Py_ssize_t i = 0; ok && i < n_rules; i++) {
        ds_rule *r = &rule[i];
        int part = 0;
        ok = PyArg_ParseTuple(PyTuple_GetItem(rules, i), "iiiiii", &part, &r->device, &r->layer_begin, &r->layer_end,
                              &r->expert_begin, &r->expert_end);
        r->part = (ds_part)part;
    }
    return ok;
}

/* Asked while the engine waits for a drive, by whatever thread waits: lets Python's handlers of signals run where that is
 * the main thread. What one raises stands until the call is over. */
static bool stops(void *ctx) {
    PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

/* NULL with an exception: what a signal's handler raised in the call, or the engine's error. */
static PyObject *raise_error(const ds_error *err) { return PyErr_Occurred() ? NULL : ds_py_raise(err); }

/* model_open(path, threads, isa, devices, rules, ram, uses uint64 (n_layer, n_expert) or None): see read_placement */
static PyObject *model_open(PyObject *self, PyObject *args) {
    PyObject *path, *devices, *rules, *uses, *capsule = NULL;
    Py_buffer view = {0};
    ds_opening opening = {.budget = {.stop = stops}};
    ds_model *model;
    ds_placement placement;
    ds_error err;
    ds_status st;
    unsigned long long ram;
    if (!PyArg_ParseTuple(args, "O&izO!O!KO", PyUnicode_FSConverter, &path, &opening.n_threads, &opening.isa,
                          &PyTuple_Type, &devices, &PyTuple_Type, &rules, &ram, &uses))
        return NULL;
    bool ok = read_placement(devices, rules, &placement);
    if (ok && !Py_IsNone(uses)) ok = ds_py_buffer(uses, 0, false, &view);
    if (ok) {
        const char *name = PyBytes_AsString(path);
        opening.placement = &placement;
        opening.budget.ram = ram < SIZE_MAX ? (size_t)ram : SIZE_MAX;
        opening.budget.uses = view.buf;
        opening.budget.n_uses = (size_t)view.len / sizeof(uint64_t);
        Py_BEGIN_ALLOW_THREADS
        st = ds_model_open(name, &opening, &model, &err);
        Py_END_ALLOW_THREADS
        capsule = st == DS_OK ? ds_py_own(model, DS_PY_MODEL, release_model) : raise_error(&err);
    }
    if (view.obj) PyBuffer_Release(&view);
    free((void *)placement.devices);
    free((void *)placement.rules);
    Py_DECREF(path);
    return capsule;
}

/* model_counts(model) -> None, or two tuples: of decoding, and of reading prompts; (tokens, needed, ready, late, told, right,
 * needed where told, bytes read, nanoseconds waited) */
static PyObject *counts_of(const ds_residency_counts *c) {
    return Py_BuildValue("(KKKKKKKKK)", (unsigned long long)c->n_tokens, (unsigned long long)c->needed,
                         (unsigned long long)c->ready, (unsigned long long)c->late, (unsigned long long)c->told,
                         (unsigned long long)c->right, (unsigned long long)c->needed_told,
                         (unsigned long long)c->bytes_read, (unsigned long long)c->wait_ns);
}

static PyObject *model_counts(void *model, PyObject *args) {
    ds_residency_counts decoding, reading;
    if (!ds_model_counts(model, &decoding, &reading)) Py_RETURN_NONE;
    return Py_BuildValue("(NN)", counts_of(&decoding), counts_of(&reading));
}
DS_PY_HELD(model_counts, DS_PY_MODEL)

/* model_needs(model) -> (all, shared, slots, experts, least, long_step): see ds_needs */
static PyObject *model_needs(void *model, PyObject *args) {
    const ds_needs n = ds_model_needs(model);
    return Py_BuildValue("(KKKKKK)", (unsigned long long)n.all, (unsigned long long)n.shared,
                         (unsigned long long)n.slots, (unsigned long long)n.experts, (unsigned long long)n.least,
                         (unsigned long long)n.long_step);
}
DS_PY_HELD(model_needs, DS_PY_MODEL)

/* model_settle(model, from, n) -> from where to go on: see ds_model_settle */
static PyObject *model_settle(void *model, PyObject *args) {
    PyObject *capsule;
    Py_ssize_t from, n;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "Onn", &capsule, &from, &n)) return NULL;
    if (from < 0 || n < 0) return PyErr_Format(PyExc_ValueError, "%zd bytes from byte %zd", n, from);
    size_t at = (size_t)from;
    Py_BEGIN_ALLOW_THREADS
    st = ds_model_settle(model, &at, (size_t)n, &err);
    Py_END_ALLOW_THREADS
    return st == DS_OK ? PyLong_FromSize_t(at) : ds_py_raise(&err);
}
DS_PY_HELD(model_settle, DS_PY_MODEL)

/* model_watch(model, device, times); model_watched(model, device) -> (dispatches, barriers, recordings, submissions, waits,
 * nanoseconds of recording, of waiting, bytes copied, nanoseconds of copying, experts copied, kept, bytes of slots,
 * crossing, bytes taken, and at most, [(name, n, nanoseconds)], (slots, tokens, chosen, held, uploads, bytes of uploads)) */
static PyObject *model_watch(void *model, PyObject *args) {
    PyObject *capsule;
    int device, times;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "Oip", &capsule, &device, &times)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_model_watch(model, device, times, &err);
    Py_END_ALLOW_THREADS
    return st == DS_OK ? Py_NewRef(Py_None) : ds_py_raise(&err);
}
DS_PY_HELD(model_watch, DS_PY_MODEL)

static PyObject *model_watched(void *model, PyObject *args) {
    PyObject *capsule, *list;
    ds_work_time times[DS_WORK_TIMES];
    ds_work w;
    ds_error err;
    ds_status st;
    int device, n;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &device)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_model_watched(model, device, times, &n, &w, &err);
    Py_END_ALLOW_THREADS
    if (st != DS_OK) return ds_py_raise(&err);
    if (!(list = PyList_New(n))) return NULL;
    for (int i = 0; i < n; i++) {
        PyObject *one =
            Py_BuildValue("(sKK)", times[i].name, (unsigned long long)times[i].n, (unsigned long long)times[i].ns);
        if (!one) return Py_DECREF(list), NULL;
        PyList_SetItem(list, i, one);
    }
    PyObject *hot = Py_BuildValue("(KKKKKK)", (unsigned long long)w.hot.slots, (unsigned long long)w.hot.tokens,
                                  (unsigned long long)w.hot.chosen, (unsigned long long)w.hot.held,
                                  (unsigned long long)w.hot.uploads, (unsigned long long)w.hot.upload_bytes);
    if (!hot) return Py_DECREF(list), NULL;
    return Py_BuildValue("(KKKKKKKKKKKKdKKNN)", (unsigned long long)w.dispatches, (unsigned long long)w.barriers,
                         (unsigned long long)w.recordings, (unsigned long long)w.submissions,
                         (unsigned long long)w.waits, (unsigned long long)w.record_ns, (unsigned long long)w.wait_ns,
                         (unsigned long long)w.copied_bytes, (unsigned long long)w.copy_ns,
                         (unsigned long long)w.copied_experts, (unsigned long long)w.kept_experts,
                         (unsigned long long)w.slot_bytes, w.crossing, (unsigned long long)w.memory,
                         (unsigned long long)w.memory_most, list, hot);
}
DS_PY_HELD(model_watched, DS_PY_MODEL)

static PyObject *model_stop(void *model, PyObject *args) {
    ds_model_stop(model);
    Py_RETURN_NONE;
}
DS_PY_HELD(model_stop, DS_PY_MODEL)

static PyObject *model_step_share(void *model, PyObject *args) {
    return PyFloat_FromDouble(ds_model_step_share(model));
}
DS_PY_HELD(model_step_share, DS_PY_MODEL)

/* model_expert_uses(model, out uint64 (n_layer, n_expert)) */
static PyObject *model_expert_uses(void *model, PyObject *args) {
    PyObject *capsule, *out;
    Py_buffer view;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &out)) return NULL;
    const ds_config *c = ds_model_config(model);
    if (!ds_py_buffer(out, (size_t)c->n_layer * (size_t)c->n_expert * sizeof(uint64_t), true, &view)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_model_expert_uses(model, view.buf, &err);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return st == DS_OK ? Py_NewRef(Py_None) : ds_py_raise(&err);
}
DS_PY_HELD(model_expert_uses, DS_PY_MODEL)

static PyObject *model_close(PyObject *self, PyObject *capsule) { return ds_py_close(capsule, DS_PY_MODEL); }

/* model_info(model) -> (hparams, threads, isa, bytes of all tensors, notes, most tokens in a step) */
static PyObject *model_info(void *model, PyObject *args) {
    unsigned long long bytes = 0;
    const ds_gguf *gguf = ds_model_gguf(model);
    for (size_t i = 0; i < ds_gguf_n_tensors(gguf); i++) bytes += ds_gguf_tensor_at(gguf, i)->n_bytes;
    return Py_BuildValue("(NisKNii)", ds_py_config(ds_model_config(model)), ds_model_threads(model),
                         ds_model_isa(model), bytes, ds_py_notes(&ds_model_config(model)->notes),
                         ds_model_max_step(model), ds_model_together(model));
}
DS_PY_HELD(model_info, DS_PY_MODEL)

/* model_step_bytes(model, n_tok, piece or 0) -> memory that such steps take */
static PyObject *model_step_bytes(void *model, PyObject *args) {
    PyObject *capsule;
    int n_tok, piece;
    if (!PyArg_ParseTuple(args, "Oii", &capsule, &n_tok, &piece)) return NULL;
    if (piece < 0 || piece > DS_MAX_STEP)
        return PyErr_Format(PyExc_ValueError, "pieces of %d tokens: expected 1 to %d", piece, DS_MAX_STEP);
    if (n_tok < 1 || n_tok > ds_model_max_step(model))
        return PyErr_Format(PyExc_ValueError, "a step of %d tokens: expected 1 to %d", n_tok, ds_model_max_step(model));
    return PyLong_FromSize_t(ds_model_step_bytes(model, n_tok, piece));
}
DS_PY_HELD(model_step_bytes, DS_PY_MODEL)

/* tap_shape(model, name) -> (row width, is int32) of an intermediate */
static PyObject *tap_shape(void *model, PyObject *args) {
    PyObject *capsule;
    const char *name;
    ds_tap_point point;
    int il;
    if (!PyArg_ParseTuple(args, "Os", &capsule, &name)) return NULL;
    if (!ds_tap_parse(ds_model_config(model), name, &point, &il))
        return PyErr_Format(PyExc_ValueError, "the model has no intermediate named `%s`", name);
    return Py_BuildValue("(iO)", ds_tap_width(ds_model_config(model), point),
                         ds_tap_is_int(point) ? Py_True : Py_False);
}
DS_PY_HELD(tap_shape, DS_PY_MODEL)

/* session_open(model, n_ctx, kv_type) */
static PyObject *session_open(void *model, PyObject *args) {
    PyObject *capsule;
    int n_ctx;
    const char *kv_type;
    ds_session *session;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Ois", &capsule, &n_ctx, &kv_type)) return NULL;
    if (ds_session_create(model, n_ctx, kv_type, &session, &err) != DS_OK) return ds_py_raise(&err);
    return ds_py_own(session, DS_PY_SESSION, release_session);
}
DS_PY_HELD(session_open, DS_PY_MODEL)

static PyObject *session_close(PyObject *self, PyObject *capsule) { return ds_py_close(capsule, DS_PY_SESSION); }

/* session_info(session) -> (n_ctx, n_past, bytes, kv_type) */
static PyObject *session_info(void *s, PyObject *args) {
    return Py_BuildValue("(iins)", ds_session_n_ctx(s), ds_session_n_past(s), (Py_ssize_t)ds_session_bytes(s),
                         ds_session_kv_type(s));
}
DS_PY_HELD(session_info, DS_PY_SESSION)

static PyObject *session_rewind(void *session, PyObject *args) {
    PyObject *capsule;
    int n;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &n)) return NULL;
    if (ds_session_rewind(session, n, &err) != DS_OK) return ds_py_raise(&err);
    Py_RETURN_NONE;
}
DS_PY_HELD(session_rewind, DS_PY_SESSION)

static PyObject *session_repeat(void *session, PyObject *args) {
    PyObject *capsule;
    int n;
    ds_status st;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &n)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_session_repeat(session, n, &err);
    Py_END_ALLOW_THREADS
    if (st != DS_OK) return ds_py_raise(&err);
    Py_RETURN_NONE;
}
DS_PY_HELD(session_repeat, DS_PY_SESSION)

/* The inputs of a step, with what they hold. */
typedef struct batch {
    int n;
    ds_input *inputs; /* (n) */
    Py_buffer *ids; /* (n) */
    PyObject **sessions; /* (n) held */
} batch;

static void batch_close(batch *b) {
    for (int i = 0; i < b->n; i++) {
        PyBuffer_Release(&b->ids[i]);
        ds_py_drop(b->sessions[i], DS_PY_SESSION);
        Py_DECREF(b->sessions[i]);
    }
    free(b->inputs);
    free(b->ids);
    free(b->sessions);
}

/* Take the next (session, ids buffer, n_logits). */
static bool batch_add(batch *b, PyObject *item) {
    ds_input *in = &b->inputs[b->n];
    PyObject *session, *ids;
    if (!PyArg_ParseTuple(item, "OOi", &session, &ids, &in->n_logits)) return false;
    if (!(in->session = ds_py_hold(session, DS_PY_SESSION))) return false;
    if (!ds_py_buffer(ids, 0, false, &b->ids[b->n])) return ds_py_drop(session, DS_PY_SESSION), false;
    const Py_ssize_t n = b->ids[b->n].len / (Py_ssize_t)sizeof(int32_t);
    in->ids = b->ids[b->n].buf;
    in->n = n > DS_MAX_LONG_STEP ? DS_MAX_LONG_STEP + 1 : (int)n;
    b->sessions[b->n++] = Py_NewRef(session);
    return true;
}

/* False with an exception; to be closed in any case. */
static bool batch_open(PyObject *list, batch *b) {
    const Py_ssize_t n = PyList_Size(list);
    *b = (batch){0};
    if (n < 1 || n > DS_MAX_STEP)
        return PyErr_Format(PyExc_ValueError, "%zd sequences in a step: expected 1 to %d", n, DS_MAX_STEP), false;
    b->inputs = calloc((size_t)n, sizeof *b->inputs);
    b->ids = calloc((size_t)n, sizeof *b->ids);
    b->sessions = calloc((size_t)n, sizeof(PyObject *));
    if (!b->inputs || !b->ids || !b->sessions) return PyErr_NoMemory(), false;
    for (Py_ssize_t i = 0; i < n; i++)
        if (!batch_add(b, PyList_GetItem(list, i))) return false;
    return true;
}

/* eval(model, [(session, ids int32 buffer, n_logits)], piece or 0, logits buffer or None, [(tap name, buffer)], tap_row):
 * one step, the GIL released. n_logits: how many of the input's last rows are wanted. */
static PyObject *eval(void *model, PyObject *args) {
    PyObject *capsule, *list, *out, *taps;
    int piece, tap_row, rows = 0, total = 0;
    const ds_config *config = ds_model_config(model);
    batch b;
    Py_buffer logits = {0};
    ds_py_tap tap = {0};
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OO!iOO!i", &capsule, &PyList_Type, &list, &piece, &out, &PyList_Type, &taps, &tap_row))
        return NULL;
    bool ok = batch_open(list, &b);
    for (int i = 0; i < b.n; i++) { /* ds_eval refuses the others before it writes a row */
        total += b.inputs[i].n;
        if (b.inputs[i].n_logits > 0 && b.inputs[i].n_logits <= DS_MAX_LONG_STEP) rows += b.inputs[i].n_logits;
    }
    if (ok && (tap_row < 0 || tap_row > INT_MAX / 2))
        ok = (PyErr_Format(PyExc_ValueError, "tap row %d", tap_row), false);
    if (ok && rows) ok = ds_py_buffer(out, (size_t)rows * (size_t)config->n_vocab * sizeof(float), true, &logits);
    if (ok && PyList_Size(taps)) ok = ds_py_tap_open(taps, config, (size_t)tap_row + (size_t)total, tap_row, &tap);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        st = ds_eval(model, b.inputs, b.n, piece, logits.buf, tap.tap.n ? &tap.tap : NULL, &err);
        Py_END_ALLOW_THREADS
        if (st != DS_OK) ok = raise_error(&err) != NULL;
    }
    ds_py_tap_close(&tap);
    if (logits.obj) PyBuffer_Release(&logits);
    batch_close(&b);
    return ok ? Py_NewRef(Py_None) : NULL;
}
DS_PY_HELD(eval, DS_PY_MODEL)

/* A step under way, with the sessions that it holds. */
typedef struct reading {
    ds_reading *step;
    batch sessions;
    size_t n_vocab;
} reading;

static void release_reading(void *pointer) {
    reading *r = pointer;
    ds_reading_end(r->step);
    batch_close(&r->sessions);
    free(r);
}

/* reading_begin(model, [(session, ids int32 buffer, n_logits)]) -> (handle, layers) */
static PyObject *reading_begin(void *model, PyObject *args) {
    PyObject *capsule, *list;
    ds_error err;
    if (!PyArg_ParseTuple(args, "OO!", &capsule, &PyList_Type, &list)) return NULL;
    reading *r = calloc(1, sizeof *r);
    if (!r) return PyErr_NoMemory();
    r->n_vocab = (size_t)ds_model_config(model)->n_vocab;
    const bool ok = batch_open(list, &r->sessions);
    if (!ok || ds_reading_begin(model, r->sessions.inputs, r->sessions.n, &r->step, &err) != DS_OK) {
        if (ok) raise_error(&err);
        release_reading(r);
        return NULL;
    }
    const int left = ds_reading_left(r->step);
    PyObject *owner = ds_py_own(r, DS_PY_READING, release_reading);
    return owner ? Py_BuildValue("(Ni)", owner, left) : NULL;
}
DS_PY_HELD(reading_begin, DS_PY_MODEL)

/* reading_run(reading, n_layers, logits buffer) -> layers left; the GIL released */
static PyObject *reading_run(void *pointer, PyObject *args) {
    const reading *r = pointer;
    PyObject *capsule, *out;
    int n_layers;
    Py_buffer logits = {0};
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OiO", &capsule, &n_layers, &out)) return NULL;
    const size_t rows = ds_reading_n_logits(r->step);
    if (rows && !ds_py_buffer(out, rows * r->n_vocab * sizeof(float), true, &logits)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_reading_run(r->step, n_layers, logits.buf, &err);
    Py_END_ALLOW_THREADS
    if (logits.obj) PyBuffer_Release(&logits);
    return st == DS_OK ? PyLong_FromLong(ds_reading_left(r->step)) : raise_error(&err);
}
DS_PY_HELD(reading_run, DS_PY_READING)

static PyObject *reading_end(PyObject *self, PyObject *capsule) { return ds_py_close(capsule, DS_PY_READING); }

PyMethodDef ds_py_model_methods[] = {
    {"model_open", model_open, METH_VARARGS, NULL},
    {"model_close", model_close, METH_O, NULL},
    {"model_counts", model_counts_held, METH_O, NULL},
    {"model_needs", model_needs_held, METH_O, NULL},
    {"model_settle", model_settle_held, METH_VARARGS, NULL},
    {"model_stop", model_stop_held, METH_O, NULL},
    {"model_watch", model_watch_held, METH_VARARGS, NULL},
    {"model_watched", model_watched_held, METH_VARARGS, NULL},
    {"model_step_share", model_step_share_held, METH_O, NULL},
    {"model_info", model_info_held, METH_O, NULL},
    {"model_expert_uses", model_expert_uses_held, METH_VARARGS, NULL},
    {"model_step_bytes", model_step_bytes_held, METH_VARARGS, NULL},
    {"tap_shape", tap_shape_held, METH_VARARGS, NULL},
    {"session_open", session_open_held, METH_VARARGS, NULL},
    {"session_close", session_close, METH_O, NULL},
    {"session_info", session_info_held, METH_O, NULL},
    {"session_rewind", session_rewind_held, METH_VARARGS, NULL},
    {"session_repeat", session_repeat_held, METH_VARARGS, NULL},
    {"eval", eval_held, METH_VARARGS, NULL},
    {"reading_begin", reading_begin_held, METH_VARARGS, NULL},
    {"reading_run", reading_run_held, METH_VARARGS, NULL},
    {"reading_end", reading_end, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
