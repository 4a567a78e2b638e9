/* fuzz_gguf.c: libFuzzer target. Reads the bytes as a GGUF, looks at everything in it, and runs it where it is a model.
 *
 *     CC=clang cmake -S cext -B build/fuzz -DDSV2_FUZZ=ON -DDSV2_ASAN=ON && cmake --build build/fuzz --target fuzz_gguf
 *     python tests/fuzz/make_corpus.py build/fuzz/corpus
 *     build/fuzz/fuzz_gguf -dict=tests/fuzz/gguf.dict -max_len=65536 -max_total_time=600 build/fuzz/corpus
 */
#include <string.h>

#include "dsv2.h"

/* Where what was read goes, so that no read is optimised away. */
static volatile unsigned sink;

static void touch(const void *data, size_t n_bytes) {
    const unsigned char *p = data;
    if (n_bytes > 0) {
        sink += p[0] + p[n_bytes - 1];
    }
}

static void read_values(const ds_gguf *g, const ds_gguf_kv *kv) {
    char key[256];
    touch(kv->data, kv->n_bytes);
    if (kv->type == DS_GGUF_ARRAY && kv->item_type == DS_GGUF_STRING) {
        const void *cursor = kv->data;
        for (uint64_t i = 0; i < kv->n_items; i++) {
            ds_str item = ds_gguf_next_str(&cursor);
            touch(item.data, item.size);
        }
    }
    if (kv->key.size >= sizeof key) {
        return;
    }
    memcpy(key, kv->key.data, kv->key.size);
    key[kv->key.size] = '\0';
    ds_error err;
    int64_t i;
    double f;
    bool b, bad[4] = {false};
    ds_str s;
    ds_gguf_get_i64(g, key, &i, &bad[0], &err);
    ds_gguf_get_f64(g, key, &f, &bad[1], &err);
    ds_gguf_get_bool(g, key, &b, &bad[2], &err);
    if (ds_gguf_get_str(g, key, &s, &bad[3], &err)) {
        touch(s.data, s.size);
    }
    /* Found under its own name: at most one of the four reads is not a refusal. */
    if (bad[0] + bad[1] + bad[2] + bad[3] < 3) {
        __builtin_trap();
    }
}

static void read_tensor(const ds_gguf *g, const ds_tensor *t) {
    float row[512];
    touch(t->data, t->n_bytes);
    if (ds_gguf_tensor_find(g, t->name) != t) {
        __builtin_trap();
    }
    if (t->format != DS_FORMAT_COUNT && t->ne[0] <= 512) {
        ds_dequantize_row(t->format, t->ne[0], t->data, row);
        touch(row, (size_t)t->ne[0] * sizeof *row);
    }
}

/* A prompt in one step and a token after it, on one thread: prefill and decode. Weights may hold anything, NaN too. A
 * byte of the input chooses the instruction set, the cache, and a prompt so long that keys and values are expanded. */
static void run_model(const uint8_t *data, size_t size) {
    enum { N_SHORT = 3, N_LONG = 140 };
    static const int32_t IDS[N_LONG + 1] = {0, 1};
    float logits[256];
    ds_model *model;
    ds_session *session;
    ds_error err;
    const uint8_t choice = size > 0 ? data[size / 2] : 0;
    const char *isa = choice & 1 ? "scalar" : NULL;
    const char *kv_type = choice & 4 ? "q8_0" : "f16";
    const int n = choice & 2 ? N_LONG : N_SHORT;
    if (ds_model_view(data, size, "fuzz", 1, isa, &model, &err) != DS_OK) {
        return;
    }
    if (ds_model_config(model)->n_vocab <= 256 && ds_session_create(model, n + 1, kv_type, &session, &err) == DS_OK) {
        ds_input prompt = {session, IDS, n, 1}, next = {session, IDS + n, 1, 1};
        if (ds_eval(model, &prompt, 1, 0, logits, NULL, &err) == DS_OK &&
            ds_eval(model, &next, 1, 0, logits, NULL, &err) == DS_OK) {
            touch(logits, (size_t)ds_model_config(model)->n_vocab * sizeof *logits);
        }
        ds_session_destroy(session);
    }
    ds_model_close(model);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ds_gguf *g;
    ds_error err;
    if (ds_gguf_view(data, size, "fuzz", &g, &err) != DS_OK) {
        return 0;
    }
    for (size_t i = 0; i < ds_gguf_n_kv(g); i++) {
        read_values(g, ds_gguf_kv_at(g, i));
    }
    for (size_t i = 0; i < ds_gguf_n_tensors(g); i++) {
        read_tensor(g, ds_gguf_tensor_at(g, i));
    }
    ds_gguf_close(g);
    run_model(data, size);
    return 0;
}
