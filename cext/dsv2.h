/* dsv2.h: the engine's public C interface: open a model, keep sessions, evaluate tokens; run single blocks for
 * calibration. Everything else in cext is private to the library. Functions that can fail return a ds_status, fill err
 * and set their out pointers on success only. */
#pragma once

#include "arch/config.h"
#include "arch/tap.h"
#include "backend/work.h"
#include "gguf/gguf.h"
#include "memory/budget.h"
#include "memory/residency.h"
#include "model/placement.h"
#include "model/sample.h"

typedef struct ds_model ds_model;
typedef struct ds_session ds_session;
typedef struct ds_block ds_block;

enum {
    DS_MAX_STEP = 1024, /* most tokens in one ds_eval of a model that the processor alone computes */
    DS_MAX_LONG_STEP = 4096, /* the same where experts come from a drive: each is read once for all of them */
    DS_SESSION_BLOCK = 64, /* tokens of a block of cache: what sessions share, and what is saved of them */
};

/* The shape of the model in a file, without its weights. DS_EUNSUPPORTED for what the engine does not run. */
ds_status ds_config_of(const ds_gguf *gguf, ds_config *out, ds_error *err);

/* How a model is opened: zeros are the usual. */
typedef struct ds_opening {
    int n_threads; /* 0: what is fastest here */
    const char *isa; /* NULL or "": the best */
    const ds_placement *placement; /* which further devices compute which parts; NULL: the processor does it all */
    ds_budget budget; /* of memory for weights; what is over is read from the file as it is needed */
} ds_opening;

/* Open the GGUF at path. Weights that the budget holds are mapped, not copied. A model that has sessions goes with the last
 * of them. budget.uses is read here; budget.stop may be asked in every step. */
ds_status ds_model_open(const char *path, const ds_opening *opening, ds_model **out, ds_error *err);
/* The same, all on the processor, over a file's bytes, which the caller keeps alive and unchanged until close; label
 * names it in errors. */
ds_status ds_model_view(const void *data, size_t size, const char *label, int n_threads, const char *isa,
                        ds_model **out, ds_error *err);
void ds_model_close(ds_model *model);
const ds_config *ds_model_config(const ds_model *model);
const ds_gguf *ds_model_gguf(const ds_model *model);
/* How many tokens chose each routed expert since the model was opened: out (n_layer, n_expert). */
ds_status ds_model_expert_uses(ds_model *model, uint64_t *out, ds_error *err);
/* What became of the experts that steps needed: false where all weights are mapped, and nothing is counted. */
bool ds_model_counts(ds_model *model, ds_residency_counts *decoding, ds_residency_counts *reading);
/* Count what a device (1, 2, ... of its placement) does from now on, and with `times` how long each kind takes there, which
 * costs some time of its own; then what it did. DS_EINVAL where there is no such device, or it counts nothing. */
ds_status ds_model_watch(ds_model *model, int device, bool times, ds_error *err);
ds_status ds_model_watched(ds_model *model, int device, ds_work_time out[DS_WORK_TIMES], int *n, ds_work *work,
                           ds_error *err);
/* What its weights take, whether they are mapped or within a budget. */
ds_needs ds_model_needs(const ds_model *model);
/* Have its weights lie in huge pages of memory, where they are mapped: see ds_gguf_settle. From any thread, while others
 * evaluate. DS_EUNSUPPORTED too where a budget holds only some. */
ds_status ds_model_settle(const ds_model *model, size_t *from, size_t n, ds_error *err);
/* End the step under way, from another thread or a signal's handler: where it waits for a drive it fails with DS_ESTOPPED. */
void ds_model_stop(ds_model *model);
/* How much of a long step under way is computed, 0 to 1; 0 where none is. From any thread. */
double ds_model_step_share(const ds_model *model);
int ds_model_threads(const ds_model *model);
/* Most tokens in one ds_eval: as many as are computed together, or DS_MAX_LONG_STEP. */
int ds_model_max_step(const ds_model *model);
/* Most tokens that are computed together: DS_MAX_STEP, or 2,048 where a GPU routes all layers and has room for them. */
int ds_model_together(const ds_model *model);
/* Memory that steps of n_tok (1 to ds_model_max_step) tokens take in all, beside weights and caches; it is kept. piece: see
 * ds_eval. */
size_t ds_model_step_bytes(const ds_model *model, int n_tok, int piece);
const char *ds_model_isa(const ds_model *model);

/* A sequence with room for n_ctx tokens of cache in kv_type ("f16", "q8_0" or "f32"); memory comes as it fills. Sessions of
 * a model may be used from several threads, each from one at a time. */
ds_status ds_session_create(ds_model *model, int n_ctx, const char *kv_type, ds_session **out, ds_error *err);
void ds_session_destroy(ds_session *session);
int ds_session_n_past(const ds_session *session);
int ds_session_n_ctx(const ds_session *session);
size_t ds_session_bytes(const ds_session *session); /* of the cache, full */
const char *ds_session_kv_type(const ds_session *session);
/* A session that begins with the first n tokens (0 <= n <= n_past) of this one and shares their cache: neither sees what
 * the other does later. This, a rewind, a repeat and a load are DS_EINVAL in a forked process. */
ds_status ds_session_fork(const ds_session *session, int n, ds_session **out, ds_error *err);
void ds_session_ids(const ds_session *session, int32_t *out); /* (n_past) of the tokens that it holds */
/* Forget all but the first n tokens (0 <= n <= n_past). */
ds_status ds_session_rewind(ds_session *session, int n, ds_error *err);
/* Go on to n tokens by repeating those that the session holds: a context that says nothing and costs as much as any, for
 * measurements at depth. */
ds_status ds_session_repeat(ds_session *session, int n, ds_error *err);

/* A session outside of memory: its blocks in order, each of ds_session_block_bytes, the last one for the tokens that are
 * left. What is loaded goes behind whole blocks, into a session of the same cache type of the same model: who keeps blocks
 * keeps the model's identity with them, and checks both. Token ids are checked here. */
size_t ds_session_block_bytes(const ds_session *session);
ds_status ds_session_block_save(const ds_session *session, int block, unsigned char *out, ds_error *err);
ds_status ds_session_block_load(ds_session *session, const unsigned char *content, int n, ds_error *err);

/* Everything that a cache's numbers depend on, told in pieces: the architecture's metadata, and of every tensor its name,
 * type, shape and a sample of its bytes. */
typedef void ds_tell(void *ctx, const void *data, size_t n_bytes);
void ds_model_identity(const ds_model *model, ds_tell *tell, void *ctx);

/* What the caches of all sessions of a model take: blocks, those that several hold, and the memory of all. */
typedef struct ds_cache_usage {
    size_t n_blocks, n_shared, bytes;
} ds_cache_usage;
ds_cache_usage ds_model_cache(ds_model *model);

/* One sequence's share of a step: n >= 1 tokens appended to it, and logits wanted after the last n_logits of them. */
typedef struct ds_input {
    ds_session *session;
    const int32_t *ids; /* (n) */
    int n, n_logits; /* 0 <= n_logits <= n */
} ds_input;

/* Append tokens to sequences of one model, each session at most once, ds_model_max_step tokens in all, of DS_MAX_STEP sessions. piece: how many are
 * computed together (1 to DS_MAX_STEP; 0: ds_model_together): more are computed piece by piece, as steps of so many one after another
 * would be, but layer by layer, so that experts are read once for all. logits (the sum of n_logits, n_vocab) takes their
 * rows, input by input; NULL where none are wanted. tap may be NULL, and is not where there are several pieces; its
 * entries' rows move on by the step's tokens. Nothing changes on failure. One step runs at a time per model: a second
 * caller waits. DS_EIO where the file was changed since it was opened or cannot be read, DS_ESTOPPED where the budget's
 * `stop` said so, DS_EFORMAT where no logit is a number, DS_EINVAL in a forked process. */
ds_status ds_eval(ds_model *model, const ds_input *inputs, int n_inputs, int piece, float *logits, ds_tap *tap,
                  ds_error *err);

/* A step that is computed some layers at a time, so that others' steps may come between: its sessions hold what they held
 * until all layers are, and may be forked meanwhile but not changed (DS_EINVAL). Of at most DS_MAX_STEP tokens; it computes
 * what ds_eval would, bit for bit. The sessions stay alive until the end. DS_EUNSUPPORTED where experts come from a drive. */
typedef struct ds_reading ds_reading;
ds_status ds_reading_begin(ds_model *model, const ds_input *inputs, int n_inputs, ds_reading **out, ds_error *err);
int ds_reading_left(const ds_reading *reading); /* layers */
size_t ds_reading_n_logits(const ds_reading *reading);
/* The next n_layers >= 1, or as many as are left, one at least. With the last the tokens are the sessions', and logits is
 * filled, which may be NULL before. On failure it can but be ended. Errors as ds_eval. */
ds_status ds_reading_run(ds_reading *reading, int n_layers, float *logits, ds_error *err);
/* What has not been computed to the end was never begun. */
void ds_reading_end(ds_reading *reading);

/* One transformer block of a model over borrowed tensors, for calibration. `header` holds the model's metadata (no
 * tensors); both stay alive until close. sublayer: of one, the other's tensors are not looked for; ffn_norm
 * belongs to both. */
ds_status ds_block_open(const ds_gguf *header, int il, const ds_tensor *tensors, int n_tensors, int n_threads,
                        ds_sublayer sublayer, ds_block **out, ds_error *err);
void ds_block_close(ds_block *block);
const ds_config *ds_block_config(const ds_block *block);
/* y (n_seq * n_tok, n_embd) = the block, or its sublayer, applied to x: n_seq windows of n_tok tokens, each from position 0.
 * Of one sublayer nothing of the other can be tapped but ffn_norm. */
ds_status ds_block_forward(ds_block *block, const float *x, int n_seq, int n_tok, float *y, ds_tap *tap, ds_error *err);
