/* model.c: models and sessions. The GIL is released around every step; Python keeps two threads out of one session. */
#include "python/py.h"

#include <stdlib.h>
#include <string.h>

static void release_model(void *model) { ds_model_close(model); }
static void release_session(void *session) { ds_session_destroy(session); }

PyObject *ds_py_config(const ds_config *c) {
    return Py_BuildValue(
        "{s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:d,s:O,s:s,s:d,s:d,s:d,s:i,"
        "s:d}",
        "arch", c->arch, "name", c->name, "n_layer", c->n_layer, "n_ctx_train", c->n_ctx_train, "n_embd", c->n_embd,
        "n_vocab", c->n_vocab, "n_head", c->n_head, "q_lora_rank", c->q_lora_rank, "kv_lora_rank", c->kv_lora_rank,
        "qk_nope_head_dim", c->nope_dim, "qk_rope_head_dim", c->rope_dim, "v_head_dim", c->v_dim, "n_ff_dense",
        c->n_ff_dense, "n_layer_dense", c->n_layer_dense, "n_expert", c->n_expert, "n_expert_used", c->n_expert_used,
        "n_expert_shared", c->n_expert_shared, "n_ff_expert", c->n_ff_expert, "n_expert_group", c->n_group,
        "n_expert_group_used", c->n_group_used, "expert_weights_scale", (double)c->expert_scale, "expert_weights_norm",
        c->expert_norm ? Py_True : Py_False, "expert_gating", c->gating == DS_GATING_SIGMOID ? "sigmoid" : "softmax",
        "rms_norm_eps", (double)c->rms_eps, "rope_freq_base", (double)c->rope_base, "rope_scaling_factor",
        (double)c->rope_factor, "rope_orig_ctx", c->rope_orig_ctx, "attention_scale", (double)c->attn_scale);
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

/* A placement from [(kind, threads, isa)] and [(part, device, layer begin, end, expert begin, end)], tuples of the caller's
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
        ok = PyArg_ParseTuple(PyTuple_GetItem(devices, i), "siz", &d->kind, &d->n_threads, &d->isa);
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

/* model_open(path, threads, isa, devices, rules): see read_placement */
static PyObject *model_open(PyObject *self, PyObject *args) {
    PyObject *path, *devices, *rules, *capsule = NULL;
    int threads;
    const char *isa;
    ds_model *model;
    ds_placement placement;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "O&izO!O!", PyUnicode_FSConverter, &path, &threads, &isa, &PyTuple_Type, &devices,
                          &PyTuple_Type, &rules))
        return NULL;
    if (read_placement(devices, rules, &placement)) {
        const char *name = PyBytes_AsString(path);
        Py_BEGIN_ALLOW_THREADS
        st = ds_model_open(name, threads, isa, &placement, &model, &err);
        Py_END_ALLOW_THREADS
        capsule = st == DS_OK ? ds_py_own(model, DS_PY_MODEL, release_model) : ds_py_raise(&err);
    }
    free((void *)placement.devices);
    free((void *)placement.rules);
    Py_DECREF(path);
    return capsule;
}

/* model_expert_uses(model, out uint64 (n_layer, n_expert)) */
static PyObject *model_expert_uses(PyObject *self, PyObject *args) {
    PyObject *capsule, *out;
    ds_model *model;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &out) || !(model = ds_py_borrow(capsule, DS_PY_MODEL))) return NULL;
    const ds_config *c = ds_model_config(model);
    if (!ds_py_buffer(out, (size_t)c->n_layer * (size_t)c->n_expert * sizeof(uint64_t), true, &view)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ds_model_expert_uses(model, view.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *model_close(PyObject *self, PyObject *capsule) {
    ds_py_close(capsule, DS_PY_MODEL);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* model_info(model) -> (hparams, threads, isa, bytes of all tensors, notes) */
static PyObject *model_info(PyObject *self, PyObject *capsule) {
    const ds_model *model = ds_py_borrow(capsule, DS_PY_MODEL);
    unsigned long long bytes = 0;
    if (!model) return NULL;
    const ds_gguf *gguf = ds_model_gguf(model);
    for (size_t i = 0; i < ds_gguf_n_tensors(gguf); i++) bytes += ds_gguf_tensor_at(gguf, i)->n_bytes;
    return Py_BuildValue("(NisKN)", ds_py_config(ds_model_config(model)), ds_model_threads(model), ds_model_isa(model),
                         bytes, ds_py_notes(&ds_model_config(model)->notes));
}

/* tap_shape(model, name) -> (row width, is int32) of an intermediate */
static PyObject *tap_shape(PyObject *self, PyObject *args) {
    PyObject *capsule;
    const char *name;
    const ds_model *model;
    ds_tap_point point;
    int il;
    if (!PyArg_ParseTuple(args, "Os", &capsule, &name) || !(model = ds_py_borrow(capsule, DS_PY_MODEL))) return NULL;
    if (!ds_tap_parse(ds_model_config(model), name, &point, &il))
        return PyErr_Format(PyExc_ValueError, "the model has no intermediate named `%s`", name);
    return Py_BuildValue("(iO)", ds_tap_width(ds_model_config(model), point),
                         ds_tap_is_int(point) ? Py_True : Py_False);
}

/* session_open(model, n_ctx, kv_type) */
static PyObject *session_open(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int n_ctx;
    const char *kv_type;
    ds_model *model;
    ds_session *session;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Ois", &capsule, &n_ctx, &kv_type) || !(model = ds_py_borrow(capsule, DS_PY_MODEL)))
        return NULL;
    if (ds_session_create(model, n_ctx, kv_type, &session, &err) != DS_OK) return ds_py_raise(&err);
    return ds_py_own(session, DS_PY_SESSION, release_session);
}

static PyObject *session_close(PyObject *self, PyObject *capsule) {
    ds_py_close(capsule, DS_PY_SESSION);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* session_info(session) -> (n_ctx, n_past, bytes, kv_type) */
static PyObject *session_info(PyObject *self, PyObject *capsule) {
    const ds_session *s = ds_py_borrow(capsule, DS_PY_SESSION);
    if (!s) return NULL;
    return Py_BuildValue("(iins)", ds_session_n_ctx(s), ds_session_n_past(s), (Py_ssize_t)ds_session_bytes(s),
                         ds_session_kv_type(s));
}

static PyObject *session_rewind(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int n;
    ds_session *session;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &n) || !(session = ds_py_borrow(capsule, DS_PY_SESSION))) return NULL;
    if (ds_session_rewind(session, n, &err) != DS_OK) return ds_py_raise(&err);
    Py_RETURN_NONE;
}

static PyObject *session_repeat(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int n;
    ds_session *session;
    ds_status st;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &n) || !(session = ds_py_borrow(capsule, DS_PY_SESSION))) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_session_repeat(session, n, &err);
    Py_END_ALLOW_THREADS
    if (st != DS_OK) return ds_py_raise(&err);
    Py_RETURN_NONE;
}

/* The inputs of a step from [(session, ids buffer, n_logits)]; views[i] holds the buffer of input i. Returns their number or -1. */
static int open_inputs(PyObject *list, ds_input *inputs, Py_buffer *views) {
    Py_ssize_t n = PyList_Size(list);
    if (n < 1 || n > DS_MAX_STEP)
        return PyErr_Format(PyExc_ValueError, "%zd sequences in a step: expected 1 to %d", n, DS_MAX_STEP), -1;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *capsule, *ids;
        bool ok = PyArg_ParseTuple(PyList_GetItem(list, i), "OOi", &capsule, &ids, &inputs[i].n_logits);
        inputs[i].session = ok ? ds_py_borrow(capsule, DS_PY_SESSION) : NULL;
        if (!inputs[i].session || !ds_py_buffer(ids, 0, false, &views[i])) {
            while (i--) PyBuffer_Release(&views[i]);
            return -1;
        }
        inputs[i].ids = views[i].buf;
        inputs[i].n = views[i].len / (Py_ssize_t)sizeof(int32_t) > DS_MAX_STEP
                          ? DS_MAX_STEP + 1
                          : (int)(views[i].len / (Py_ssize_t)sizeof(int32_t));
    }
    return (int)n;
}

/* eval(model, [(session, ids int32 buffer, n_logits)], logits buffer or None, [(tap name, buffer)], tap_row):
 * one step, the GIL released. n_logits: how many of the input's last rows are wanted. */
static PyObject *eval(PyObject *self, PyObject *args) {
    PyObject *capsule, *list, *out, *taps;
    int tap_row, n, rows = 0, total = 0;
    ds_model *model;
    ds_input inputs[DS_MAX_STEP];
    Py_buffer views[DS_MAX_STEP], logits = {0};
    ds_py_tap tap = {0};
    ds_error err;
    ds_status st;
    bool ok = true;
    if (!PyArg_ParseTuple(args, "OO!OO!i", &capsule, &PyList_Type, &list, &out, &PyList_Type, &taps, &tap_row))
        return NULL;
    if (!(model = ds_py_borrow(capsule, DS_PY_MODEL)) || (n = open_inputs(list, inputs, views)) < 0) return NULL;
    for (int i = 0; i < n; i++) { /* ds_eval refuses the others before it writes a row */
        total += inputs[i].n;
        if (inputs[i].n_logits > 0 && inputs[i].n_logits <= DS_MAX_STEP) rows += inputs[i].n_logits;
    }
    if (rows)
        ok = ds_py_buffer(out, (size_t)rows * (size_t)ds_model_config(model)->n_vocab * sizeof(float), true, &logits);
    if (ok && PyList_Size(taps))
        ok = ds_py_tap_open(taps, ds_model_config(model), (size_t)(tap_row + total), tap_row, &tap);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        st = ds_eval(model, inputs, n, logits.buf, tap.tap.n ? &tap.tap : NULL, &err);
        Py_END_ALLOW_THREADS
        if (st != DS_OK) ok = ds_py_raise(&err) != NULL;
    }
    ds_py_tap_close(&tap);
    if (logits.obj) PyBuffer_Release(&logits);
    for (int i = 0; i < n; i++) PyBuffer_Release(&views[i]);
    return ok ? Py_NewRef(Py_None) : NULL;
}

PyMethodDef ds_py_model_methods[] = {
    {"model_open", model_open, METH_VARARGS, NULL},
    {"model_close", model_close, METH_O, NULL},
    {"model_info", model_info, METH_O, NULL},
    {"model_expert_uses", model_expert_uses, METH_VARARGS, NULL},
    {"tap_shape", tap_shape, METH_VARARGS, NULL},
    {"session_open", session_open, METH_VARARGS, NULL},
    {"session_close", session_close, METH_O, NULL},
    {"session_info", session_info, METH_O, NULL},
    {"session_rewind", session_rewind, METH_VARARGS, NULL},
    {"session_repeat", session_repeat, METH_VARARGS, NULL},
    {"eval", eval, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
