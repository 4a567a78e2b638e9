"""The same files in llama.cpp and here. It is the reference only where the model has no expert groups (README)."""

import gguf
import numpy as np
import pytest
from ref.hparams import Yarn
from ref.model import Model as Reference
from support import llama
from support.scoring import perplexity, relative_error
from support.tiny import SPECS, WIDE, tokens, variant, write_gguf

import cext

NARROW = variant(WIDE, name="narrow", n_ff_expert=96, n_shared=2, n_layer=2)
# DeepSeekMoE's attention in rows of whole blocks; llama.cpp wants keys and values as wide as the model.
MOE = variant(WIDE, name="moe_wide", n_head_kv=4, q_lora_rank=0, kv_lora_rank=0, nope=0, rope=64, yarn=None, n_shared=2)
MOE_SHARED = variant(MOE, name="moe_wide_shared", n_head_kv=2, seed=31, n_layer_dense=0)
MOE_YARN = variant(MOE, name="moe_wide_yarn", seed=32, yarn=Yarn(8.0, 64))
LITE_27 = variant(SPECS[0], name="lite_27", n_layer=27, seed=31)
FLOAT32 = 1e-5  # 27 layers of 6 products of sqrt(k) 2^-24: where neither rounds activations
IDS = tokens(WIDE, 400)
N_EXACT = 64  # as many of them in the numpy oracle
PURE = [name for name in llama.FILE_TYPES if name in {row["name"] for row in cext.formats()}]
MIXES = {
    "q2_k_m": llama.llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "q3_k_m": llama.llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "q4_k_m": llama.llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q5_k_m": llama.llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """``written(spec, name="f32")``: the spec's GGUF, as it is or by llama.cpp's quantiser, made once."""
    folder, paths = tmp_path_factory.mktemp("llama"), {}

    def path(spec, name="f32"):
        if (spec.name, name) not in paths:
            target = folder / f"{spec.name}-{name}.gguf"
            if name == "f32":
                write_gguf(target, spec)
            else:
                file_type = MIXES.get(name, llama.FILE_TYPES.get(name))
                llama.quantize(path(spec), target, file_type, pure=name not in MIXES)
            paths[spec.name, name] = target
        return paths[spec.name, name]

    return path


def decoded(path):
    """Every tensor of a GGUF as gguf-py decodes it: a third implementation of the formats."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}


def ours(path, ids, **options):
    with cext.Model(path, threads=1, **options) as model:
        return model.session(len(ids), kv_type="f32").eval(ids, "all")


def assert_agree(path, spec, ids):
    """Perplexities within 0.3 %, and no further from exact arithmetic on the same weights than llama.cpp is.

    Both round activations to 8 bits before a product with quantised weights, each in its way: at 1 % of the logits'
    spread a token, two perplexities over 400 random tokens part by about 0.01 sqrt(2 / 400) = 0.07 %. The median
    over tokens leaves out the few where rounding tips a routing decision one way or the other.
    """
    here, there = ours(path, ids), llama.logits(path, ids)
    assert perplexity(here, ids) == pytest.approx(perplexity(there, ids), rel=3e-3)
    exact = Reference(spec.hparams, decoded(path)).forward(ids[:N_EXACT])
    error_here, error_there = (np.median(relative_error(logits[:N_EXACT], exact)) for logits in (here, there))
    assert error_here <= 1.2 * error_there + FLOAT32


@pytest.mark.parametrize("name", PURE)
def test_files_of_llamacpps_quantiser(written, name):
    """Every matrix in one format, where its rows allow."""
    path = written(WIDE, name)
    types = {t.type_name for t in cext.Gguf(path).tensors}
    assert name in types
    assert_agree(path, WIDE, IDS)


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_and_their_fallbacks(written, mix):
    path = written(NARROW, mix)
    assert len({t.type for t in cext.Gguf(path).tensors}) > 3
    assert_agree(path, NARROW, IDS)


@pytest.mark.parametrize("isa", cext.isas())
@pytest.mark.parametrize("name", PURE)
def test_every_isa_runs_every_format(written, name, isa):
    """Prefill and decode of a quantised file on each ISA equal its default's.

    Exactly but for float32 rounding, until an activation falls so near the middle of two 8-bit values that rounding
    decides it; from then on by what such rounding costs, which is 0.01.
    """
    path = written(NARROW, name)
    ids = IDS[:200]
    expected = ours(path, ids)
    with cext.Model(path, threads=1, isa=isa) as model:
        session = model.session(len(ids), kv_type="f32")
        got = np.concatenate([session.eval(piece, "all") for piece in (ids[:-2], ids[-2:-1], ids[-1:])])
    error = relative_error(got, expected)
    assert error.min() < 1e-5 and np.median(error) < 0.02


@pytest.mark.parametrize("name", ("f32", "q8_0", "q4_k_m", "iq4_xs"))
@pytest.mark.parametrize("spec", (MOE, MOE_SHARED, MOE_YARN), ids=lambda s: s.name)
def test_plain_attention(written, spec, name):
    """DeepSeekMoE's files: its own architecture, in which llama.cpp's graph is another than V2's."""
    assert_agree(written(spec, name), spec, IDS)


@pytest.mark.parametrize("spec", (MOE, MOE_SHARED), ids=lambda s: s.name)
def test_plain_attention_in_float32(written, spec):
    """Nothing is rounded but sums: the two engines' logits are the same, also where q, k and v are one matrix."""
    ids = IDS[:200]
    there = llama.logits(written(spec), ids)
    assert relative_error(ours(written(spec), ids), there).max() < FLOAT32
    fused = write_gguf(written(spec).with_suffix(".fused.gguf"), spec, legacy=True)
    assert relative_error(ours(fused, ids), there).max() < FLOAT32
    assert relative_error(llama.logits(fused, ids), there).max() < FLOAT32


@pytest.mark.parametrize("legacy", (False, True), ids=("split", "legacy"))
@pytest.mark.parametrize("dtype", (np.float32, np.float16), ids=("f32", "f16"))
def test_v2_lites_form(tmp_path, legacy, dtype):
    """27 layers without q-LoRA; both forms of kv_b; the keys mean the same to both engines."""
    path = write_gguf(tmp_path / "m.gguf", LITE_27, legacy=legacy, dtype=dtype)
    ids = tokens(LITE_27, 256)
    assert_agree(path, LITE_27, ids)


@pytest.mark.parametrize("spec", (WIDE, MOE), ids=lambda s: s.name)
def test_float16_cache(written, spec):
    """The f16 caches of both cost the same."""
    path, ids = written(spec), IDS[:96]
    exact = Reference(spec.hparams, decoded(path)).forward(ids)
    with cext.Model(path) as model:
        here = model.session(len(ids)).eval(ids, "all")
    there = llama.logits(path, ids, kv_type="f16")
    assert np.median(relative_error(here, exact)) <= 1.2 * np.median(relative_error(there, exact))
