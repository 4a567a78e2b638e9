"""Sessions in files: they go on where they were, and nothing but a whole file of the same model is read."""

import os

import numpy as np
import pytest
from support.tiny import SPECS, Checkpoint, gguf_metadata, gguf_tensors, spec_named, tokens, variant, write_tensors

import cext
from cext import _engine, saved, system

LITE = SPECS[0]
WIDE = variant(spec_named("all_dense"), name="wide", kv_lora_rank=128)
TYPES = ("f16", "q8_0", "f32")


@pytest.fixture
def model(tiny_gguf):
    with cext.Model(tiny_gguf(LITE), threads=2) as opened:
        yield opened


@pytest.fixture
def written(model, tmp_path):
    """A saved session of 150 tokens: three blocks."""
    session = model.session(300)
    session.eval(tokens(LITE, 150))
    session.save(tmp_path / "talk")
    return tmp_path / "talk"


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("spec", (LITE, WIDE, spec_named("moe_shared")), ids=lambda s: s.name)
@pytest.mark.parametrize("n", (0, 1, 64, 150))
def test_a_session_goes_on_where_it_was(tiny_gguf, tmp_path, spec, n, kv_type):
    ids = tokens(spec, 260)
    with cext.Model(tiny_gguf(spec), threads=2) as model:
        session = model.session(300, kv_type)
        if n:
            session.eval(ids[:n])
        session.save(tmp_path / "talk")
        want = session.eval(ids[n:], "all")
    with cext.Model(tiny_gguf(spec), threads=1) as model:  # another process's, as it were
        for n_ctx in (None, 260):
            loaded = model.load_session(tmp_path / "talk", n_ctx)
            assert (loaded.n_past, loaded.n_ctx, loaded.kv_type) == (n, n_ctx or 300, kv_type)
            np.testing.assert_array_equal(loaded.ids, ids[:n])
            np.testing.assert_array_equal(loaded.fork().eval(ids[n:], "all"), want)
            np.testing.assert_array_equal(loaded.eval(ids[n:], "all"), want)


def test_what_was_forgotten_is_not_in_the_file(model, tmp_path):
    """The same tokens make the same file, whatever the session held before."""
    ids = tokens(LITE, 100)
    plain, other = model.session(300), model.session(300)
    other.eval(tokens(LITE, 250, seed=4))
    other.rewind(0)
    other.eval(ids[:90])
    other.eval(tokens(LITE, 30, seed=5))
    other.rewind(90)
    plain.eval(ids[:90])
    for name, session in (("plain", plain), ("other", other)):
        session.save(tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "other").read_bytes()


def test_its_name_is_on_the_disk(model, tmp_path, monkeypatch):
    """The folder is synced once the whole file has its name there."""
    synced = []
    monkeypatch.setattr(system, "sync_folder", lambda path: synced.append((path, (path / "talk").exists())))
    model.session(8).save(tmp_path / "talk")
    assert synced == [(tmp_path, True)]


def test_only_its_owner_reads_it(written):
    assert written.stat().st_mode & 0o77 == 0


def test_another_model_is_refused(tiny_gguf, written):
    """Of another shape, and of the same shape with other weights."""
    for spec in (SPECS[1], variant(LITE, seed=7)):
        with cext.Model(tiny_gguf(spec)) as other, pytest.raises(cext.MismatchError, match="another model") as caught:
            other.load_session(written)
        assert caught.value.hint


def test_every_weight_counts(tiny_gguf, tmp_path, model):
    """A model whose file differs in one tensor of each kind is another."""
    whole = bytearray(tiny_gguf(LITE).read_bytes())
    with cext.Gguf(tiny_gguf(LITE)) as gguf:
        tensors = gguf.tensors
    seen = set()
    for tensor in tensors:
        kind = tensor.name.split(".", 2)[-1]
        if kind in seen:
            continue
        seen.add(kind)
        changed = whole.copy()
        changed[tensor.offset + tensor.nbytes // 2 // 4 * 4] ^= 1  # the lowest bit of a float
        (tmp_path / "other.gguf").write_bytes(changed)
        with cext.Model(tmp_path / "other.gguf") as other:
            assert saved.identity(other) != saved.identity(model), tensor.name


def test_the_same_bytes_of_another_type_are_another_model(tmp_path):
    """f16 and bf16: sixteen bits a weight, and nothing but the type tells them apart."""
    tensors = {
        name: value.astype(np.float16) if value.ndim > 1 else value
        for name, value in gguf_tensors(Checkpoint(LITE)).items()
    }
    write_tensors(tmp_path / "half.gguf", gguf_metadata(LITE), tensors)
    whole = bytearray((tmp_path / "half.gguf").read_bytes())
    name = b"blk.0.attn_output.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8  # behind its number of dimensions, and these
    assert whole[at : at + 4] == bytes([1, 0, 0, 0])
    whole[at] = 30
    (tmp_path / "brain.gguf").write_bytes(whole)
    with cext.Model(tmp_path / "half.gguf") as half, cext.Model(tmp_path / "brain.gguf") as brain:
        assert saved.identity(half) != saved.identity(brain)


def test_another_cache_type_is_refused(model, written):
    assert model.load_session(written, kv_type="f16").n_past == 150
    with pytest.raises(cext.MismatchError, match="f16, not q8_0") as caught:
        model.load_session(written, kv_type="q8_0")
    assert "f16" in caught.value.hint


def test_a_context_that_is_too_small(model, written):
    with pytest.raises(cext.ContextFullError, match=r"150 .*149"):
        model.load_session(written, 149)


def test_a_file_cut_short_is_refused(model, written, tmp_path):
    whole = written.read_bytes()
    block = _engine.session_block_bytes(model.session(1)._handle)
    for n in (
        0,
        1,
        7,
        8,
        50,
        saved.HEADER.size,
        saved.HEADER.size + 16,
        saved.HEADER.size + 16 + block,
        len(whole) - 1,
    ):
        (tmp_path / "cut").write_bytes(whole[:n])
        with pytest.raises(cext.FormatError, match=r"cut short|no session"):
            model.load_session(tmp_path / "cut")
    (tmp_path / "long").write_bytes(whole + b"\0")
    with pytest.raises(cext.FormatError, match="too long"):
        model.load_session(tmp_path / "long")


def test_a_damaged_file_is_refused(model, written, tmp_path):
    """One bit anywhere: each field of the header, and places all over the blocks and their digests."""
    whole, rng = written.read_bytes(), np.random.default_rng(1)
    places = [*range(saved.HEADER.size + 16), *rng.integers(0, len(whole), 200), len(whole) - 1]
    assert model.load_session(written).n_past == 150
    for at in places:
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "damaged").write_bytes(changed)
        with pytest.raises((cext.FormatError, cext.UnsupportedError)):
            model.load_session(tmp_path / "damaged")
    assert model.cache_usage().blocks <= 3


def test_blocks_of_two_files_do_not_mix(model, written, tmp_path):
    session = model.session(300)
    session.eval(tokens(LITE, 150, seed=2))
    session.save(tmp_path / "second")
    one, two = bytearray(written.read_bytes()), (tmp_path / "second").read_bytes()
    size = (len(one) - saved.HEADER.size - 16) // 3
    at = saved.HEADER.size + 16 + size
    one[at : at + size] = two[at : at + size]
    (tmp_path / "mixed").write_bytes(one)
    with pytest.raises(cext.FormatError, match="block 1"):
        model.load_session(tmp_path / "mixed")


def forged(path, header, blocks):
    """A file whose digests fit, of a header's fields and (bytes, ...) of blocks."""
    seal = saved.digest(header.pack())
    parts = [header.pack(), seal]
    for block in blocks:
        seal = saved.digest(seal, block)
        parts += [block, seal]
    path.write_bytes(b"".join(parts))
    return path


def test_a_forged_file_does_no_harm(model, tmp_path):
    """Digests fit and the content does not: ids outside the vocabulary, sizes that are another's."""
    size = _engine.session_block_bytes(model.session(1)._handle)
    good = {"block_tokens": 64, "block_bytes": size, "n_ctx": 70, "n_past": 2, "kv_type": "f16"}
    good |= {"model": saved.identity(model)}
    block = bytearray(size)
    block[:8] = np.array([3, 4], "<i4").tobytes()
    loaded = model.load_session(forged(tmp_path / "good", saved.Header(**good), [block]))
    np.testing.assert_array_equal(loaded.ids, [3, 4])
    for bad in (LITE.n_vocab, -1):
        block[4:8] = np.array([bad], "<i4").tobytes()
        with pytest.raises(cext.FormatError, match=str(bad)):
            model.load_session(forged(tmp_path / "ids", saved.Header(**good), [block]))
    for change in (
        {"kv_type": "q8_0"},
        {"kv_type": "other"},
        {"block_bytes": size - 64},
        {"block_tokens": 32},
        {"n_ctx": 1},
        {"n_ctx": 0},
        {"n_ctx": (1 << 32) - 1},
        {"n_past": (1 << 32) - 1},
        {"block_bytes": (1 << 63) - 1},
    ):
        with pytest.raises(cext.EngineError):
            model.load_session(forged(tmp_path / "sizes", saved.Header(**(good | change)), [block]))


def test_no_file_and_no_folder(model, tmp_path):
    with pytest.raises(cext.FileError, match="nowhere"):
        model.load_session(tmp_path / "nowhere")
    with pytest.raises(cext.FileError, match="nowhere"):
        model.session(1).save(tmp_path / "nowhere" / "talk")


def test_a_save_that_fails_leaves_the_old_file(model, written, monkeypatch):
    """The disk is full at the last step, or Ctrl-C comes in the middle."""
    before, session = written.read_bytes(), model.session(10)
    session.eval([1, 2])

    def full(_):
        raise OSError(28, "No space left on device")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(cext.FileError, match="No space left"):
            session.save(written)
    with monkeypatch.context() as patch:
        patch.setattr(_engine, "session_block_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.save(written)
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    assert written.read_bytes() == before
    session.save(written)
    assert model.load_session(written).n_past == 2
