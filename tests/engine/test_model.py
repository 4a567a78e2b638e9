"""The engine on tiny f32 models: equal to transformers' golden logits and, point by point, to the numpy oracle."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ref.model import Model as Reference
from support.logits import FLOAT32, assert_close, firm_prompt, reference
from support.tiny import NUMPY_ONLY, SPECS, spec_named, tokens, variant

import cext

GOLDEN = Path(__file__).parents[1] / "golden"
ALL_SPECS = (*SPECS, *NUMPY_ONLY)
LITE, PRO, V3 = SPECS[0], SPECS[1], spec_named("v3")
MOE, MOE_SHARED = spec_named("moe"), spec_named("moe_shared")


class Halves(Reference):
    """Rows kept as IEEE halves, which peers call an f16 cache."""

    def cached(self, first, second):
        return first.astype(np.float16).astype(np.float64), second.astype(np.float16).astype(np.float64)


def in_pieces(session, ids, cuts):
    """Logits of all tokens, evaluated in the pieces between the cuts."""
    parts = [session.eval(ids[begin:end], "all") for begin, end in pairwise([0, *cuts, len(ids)])]
    return np.concatenate(parts)


@pytest.fixture
def open_model(tiny_gguf):
    """``open_model(spec, legacy=False, **options)``: a model that is closed when the test ends."""
    opened = []

    def open_(spec, legacy=False, **options):
        opened.append(cext.Model(tiny_gguf(spec, legacy), **options))
        return opened[-1]

    yield open_
    for model in opened:
        model.close()


@pytest.fixture(params=ALL_SPECS, ids=lambda s: s.name)
def expected(request):
    """(spec, ids, logits): transformers' where it runs the spec, the numpy oracle's where not."""
    spec = request.param
    if spec in NUMPY_ONLY:
        ids = tokens(spec, 32)
        return spec, ids, reference(spec).forward(ids)
    golden = np.load(GOLDEN / f"{spec.name}.npz")
    return spec, golden["ids"], golden["logits"]


@pytest.mark.parametrize("legacy", (False, True), ids=("split", "legacy"))
def test_prefill(open_model, expected, legacy):
    spec, ids, logits = expected
    session = open_model(spec, legacy).session(len(ids), kv_type="f32")
    assert_close(session.eval(ids, "all"), logits)
    assert session.n_past == len(ids)


@pytest.mark.parametrize("cuts", ([1], [16], [31], [3, 4, 20], range(1, 32)), ids=str)
def test_any_split_of_the_prompt(open_model, expected, cuts):
    spec, ids, logits = expected
    assert_close(in_pieces(open_model(spec).session(len(ids), kv_type="f32"), ids, cuts), logits)


def test_last_logits_are_the_last_row_of_all(open_model, expected):
    spec, ids, logits = expected
    model = open_model(spec)
    assert_close(model.session(32, kv_type="f32").eval(ids), logits[-1])
    assert_close(model.session(32, kv_type="f32").eval(ids.tolist(), logits="last"), logits[-1])


@pytest.mark.parametrize("isa", cext.isas())
def test_every_isa(open_model, expected, isa):
    spec, ids, logits = expected
    model = open_model(spec, isa=isa)
    assert model.isa == isa
    assert_close(in_pieces(model.session(32, kv_type="f32"), ids, [20, 21, 22]), logits)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_threads_do_not_change_a_bit(open_model, spec):
    ids = tokens(spec, 150)
    alone = in_pieces(open_model(spec, threads=1).session(200), ids, [128, 148, 149])
    for threads in (2, 3):
        model = open_model(spec, threads=threads)
        assert model.threads == threads
        np.testing.assert_array_equal(in_pieces(model.session(200), ids, [128, 148, 149]), alone)


@pytest.mark.parametrize("spec", (LITE, PRO, V3, spec_named("all_odd"), MOE, MOE_SHARED), ids=lambda s: s.name)
def test_longer_than_a_chunk(open_model, spec):
    """Prompts over the chunk of 512 and over the switch from the absorbed to the expanded form, and decode at depth."""
    ids, logits = firm_prompt(reference(spec), spec, 700, seed=0)
    for legacy in (False, True):
        model = open_model(spec, legacy)
        for cuts in ([], [1], [127, 255], [128], [511, 512, 640], [600, *range(601, 620)]):
            assert_close(in_pieces(model.session(700, kv_type="f32"), ids, cuts), logits)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_16_bit_cache(open_model, spec):
    """The f16 cache, int16 rows and products of them, costs no more than keeping halves costs exact arithmetic."""
    ids = tokens(spec, 32)
    exact = reference(spec).forward(ids)
    halves = np.abs(reference(spec, Halves).forward(ids) - exact).max() / np.ptp(exact)
    assert halves > 5 * FLOAT32  # or this would show nothing
    for cuts in ([], [16], range(1, 32)):
        session = open_model(spec).session(32)
        assert session.kv_type == "f16"
        assert_close(in_pieces(session, ids, cuts), exact, FLOAT32 + halves)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("cuts", ([], [20, 21, 22]), ids=("prefill", "decode"))
def test_every_intermediate(open_model, spec, cuts):
    """Each tap equals the oracle's value of that name; the first that deviates in the order of computation is named."""
    ids, ref = tokens(spec, 32), reference(spec)
    ref.forward(ids)
    session = open_model(spec).session(32, kv_type="f32")
    parts = []
    for begin, end in pairwise([0, *cuts, len(ids)]):
        tap = cext.Tap(dict.fromkeys(ref.taps))
        session.eval(ids[begin:end], tap=tap)
        parts.append(tap)
    got = {name: np.concatenate([part[name] for part in parts]) for name in ref.taps}
    for name, true in ref.taps.items():
        expected = true
        point, _, il = name.partition("-")
        if point == "experts":
            assert got[name].dtype == np.int32
            np.testing.assert_array_equal(np.sort(got[name]), np.sort(expected), err_msg=name)
            continue
        assert got[name].dtype == np.float32, name
        value = got[name].reshape(expected.shape)
        if point in ("expert_weights", "expert_hidden"):  # in the order of the chosen experts, which is free
            expected = by_expert(expected, ref.taps[f"experts-{il}"])
            value = by_expert(value, got[f"experts-{il}"])
        try:
            assert_close(value, expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def by_expert(values, experts):
    """values (n, n_expert_used, ...) ordered by the expert's number."""
    order = np.argsort(experts, axis=1)
    return np.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), axis=1)


def test_tapping_changes_nothing(open_model):
    model, ids = open_model(PRO), tokens(PRO, 20)
    plain = model.session(32).eval(ids, "all")
    np.testing.assert_array_equal(model.session(32).eval(ids, "all", tap=cext.Tap({"l_out-1": None})), plain)


@pytest.mark.parametrize("n", (2, 33, 70))
def test_last_logits_alone(open_model, n):
    """With one row of logits wanted, the last block runs for one token: the same logits, and the same cache."""
    model, ref = open_model(LITE), reference(LITE)
    ids, _ = firm_prompt(ref, LITE, n + 3, 0)
    all_rows, last_row = model.session(n + 3, kv_type="f32"), model.session(n + 3, kv_type="f32")
    assert_close(last_row.eval(ids[:n]), all_rows.eval(ids[:n], "all")[-1])
    assert_close(last_row.eval(ids[n:], "all"), all_rows.eval(ids[n:], "all"))


@pytest.mark.parametrize("spec", (LITE, PRO, V3, MOE), ids=lambda s: s.name)
@pytest.mark.parametrize("keep", (0, 1, 7, 19, 20))
def test_rewind_forgets(open_model, spec, keep):
    model, ids, others = open_model(spec), tokens(spec, 30), tokens(spec, 20, seed=1)
    straight, rewound = model.session(40), model.session(40)
    for session in (straight, rewound):
        if keep:
            session.eval(ids[:keep])
    rewound.eval(others)
    rewound.rewind(keep)
    assert rewound.n_past == keep
    np.testing.assert_array_equal(rewound.eval(ids[keep:], "all"), straight.eval(ids[keep:], "all"))


@pytest.mark.parametrize("spec", (LITE, PRO, V3, MOE_SHARED), ids=lambda s: s.name)
def test_sessions_do_not_see_each_other(open_model, spec):
    model = open_model(spec)
    prompts = [tokens(spec, 24, seed=i) for i in range(3)]
    cuts = ([5, 6, 20], [1, 12, 13], [8, 9, 10])
    alone = [in_pieces(model.session(24), ids, cut) for ids, cut in zip(prompts, cuts, strict=True)]
    sessions = [model.session(24) for _ in prompts]
    together = [[] for _ in prompts]
    for step in range(4):
        for i, (ids, cut) in enumerate(zip(prompts, cuts, strict=True)):
            begin, end = [0, *cut, len(ids)][step : step + 2]
            together[i].append(sessions[i].eval(ids[begin:end], "all"))
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(got), expected)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_batch_of_sessions(open_model, spec):
    """Steps over sessions of unequal depth and unequal numbers of new tokens."""
    model, ref = open_model(spec), reference(spec)
    prompts = [firm_prompt(ref, spec, 32, seed) for seed in range(4)]
    sessions = [model.session(32, kv_type="f32") for _ in prompts]
    cuts = ((0, 1, 2, 3), (0, 9, 10, 11), (0, 1, 31, 32), (0, 4, 12, 20))
    for step in range(3):
        pieces = [ids[cut[step] : cut[step + 1]] for (ids, _), cut in zip(prompts, cuts, strict=True)]
        got = cext.eval_batch(list(zip(sessions, pieces, strict=True)))
        assert [session.n_past for session in sessions] == [cut[step + 1] for cut in cuts]
        for row, (_, logits), cut in zip(got, prompts, cuts, strict=True):
            assert_close(row, logits[cut[step + 1] - 1])


@pytest.mark.parametrize("wanted", ((0, 1, 3), (2, 0, 2), (1, 1, 1), (0, 0, 0), (5, 7, 4)), ids=str)
@pytest.mark.parametrize("spec", (LITE, PRO, MOE_SHARED), ids=lambda s: s.name)
def test_logits_of_each_sequence(open_model, spec, wanted):
    """Every sequence of a step says how many of its last rows it wants; the others change nothing."""
    model = open_model(spec)
    pieces = [(tokens(spec, 9, seed=i), n) for i, n in enumerate((5, 7, 4))]
    alone = [in_pieces(model.session(9, kv_type="f32"), ids, [n]) for ids, n in pieces]
    sessions = [model.session(9, kv_type="f32") for _ in pieces]
    got = cext.eval_batch([(s, ids[:n]) for s, (ids, n) in zip(sessions, pieces, strict=True)], wanted)
    expected = [rows[n - k : n] for rows, (_, n), k in zip(alone, pieces, wanted, strict=True)]
    assert got.shape == (sum(wanted), spec.n_vocab)
    if sum(wanted):
        assert_close(got, np.concatenate(expected))
    for session, (ids, n), rows in zip(sessions, pieces, alone, strict=True):
        assert session.n_past == n
        assert_close(session.eval(ids[n:], "all"), rows[n:])


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_small_steps_are_bit_equal_to_a_sequence_alone(open_model, spec):
    """A token and its draft beside others' tokens: up to four tokens a step add in one order."""
    model = open_model(spec)
    cuts = ((0, 2, 3, 6), (0, 1, 2, 3), (0, 1, 1, 1))
    prompts = [tokens(spec, 8, seed=i) for i in range(3)]
    sessions = [model.session(8) for _ in prompts]
    twins = [model.session(8) for _ in prompts]
    for step in range(3):
        parts = [ids[cut[step] : cut[step + 1]] for ids, cut in zip(prompts, cuts, strict=True)]
        batch = [(session, part) for session, part in zip(sessions, parts, strict=True) if len(part)]
        got = cext.eval_batch(batch, [len(part) for _, part in batch])
        alone = [twin.eval(part, "all") for twin, part in zip(twins, parts, strict=True) if len(part)]
        np.testing.assert_array_equal(got, np.concatenate(alone))


@pytest.mark.parametrize("wanted", ((-1,), (3,), (1, 1), ()), ids=str)
def test_logits_of_more_than_there_are(open_model, wanted):
    session = open_model(PRO).session(4)
    with pytest.raises(ValueError, match=r"logits|shorter|longer"):
        cext.eval_batch([(session, [1, 2])], wanted)
    assert session.n_past == 0


@pytest.mark.parametrize("spec", (PRO, MOE, MOE_SHARED), ids=lambda s: s.name)
def test_batches_at_depth(open_model, spec):
    """Steps of many sessions with long caches: attention by parts, beside a session that has none."""
    model, ref = open_model(spec), reference(spec)
    prompts = [firm_prompt(ref, spec, n, seed) for seed, n in enumerate((400, 130, 2, 260))]
    sessions = [model.session(512, kv_type="f32") for _ in prompts]
    for session, (ids, _) in zip(sessions, prompts, strict=True):
        session.eval(ids[:-1])
    got = cext.eval_batch([(session, ids[-1:]) for session, (ids, _) in zip(sessions, prompts, strict=True)])
    for row, (_, logits) in zip(got, prompts, strict=True):
        assert_close(row, logits[-1])


@pytest.mark.parametrize("legacy", (False, True), ids=("split", "legacy"))
@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_hparams(open_model, spec, legacy):
    hp, moe = open_model(spec, legacy).hparams, spec.n_layer_dense < spec.n_layer
    assert hp == {
        "arch": spec.arch,
        "attention": "plain" if spec.n_head_kv else "latent",
        "n_head_kv": spec.n_head_kv or 1,
        "name": spec.name,
        "n_layer": spec.n_layer,
        "n_ctx_train": spec.n_ctx,
        "n_embd": spec.n_embd,
        "n_vocab": spec.n_vocab,
        "n_head": spec.n_head,
        "q_lora_rank": spec.q_lora_rank,
        "kv_lora_rank": spec.kv_lora_rank,
        "qk_nope_head_dim": spec.nope,
        "qk_rope_head_dim": spec.rope,
        "v_head_dim": spec.v,
        "n_ff_dense": spec.n_ff_dense,
        "n_layer_dense": spec.n_layer_dense,
        "n_expert": spec.n_expert * moe,
        "n_expert_used": spec.n_used * moe,
        "n_expert_shared": spec.n_shared * moe,
        "n_ff_expert": spec.n_ff_expert * moe,
        "n_expert_group": spec.n_group,
        "n_expert_group_used": spec.n_group_used,
        "expert_weights_scale": pytest.approx(spec.scale, rel=1e-7),
        "expert_weights_norm": spec.norm_topk,
        "expert_gating": "sigmoid" if spec.v3 else "softmax",
        "rms_norm_eps": pytest.approx(spec.eps, rel=1e-7),
        "rope_freq_base": spec.rope_base,
        "rope_scaling_factor": spec.yarn.factor if spec.yarn else 1.0,
        "rope_orig_ctx": spec.yarn.orig_ctx if spec.yarn else spec.n_ctx,
        "attention_scale": pytest.approx(spec.hparams.attention_scale, rel=1e-6),
        "attention_temperature_scale": pytest.approx(spec.temperature, rel=1e-7),
        "attention_temperature_length": spec.yarn.orig_ctx if spec.temperature else 0,
        "rope_beta_fast": spec.yarn.beta_fast if spec.yarn else 32.0,
        "rope_beta_slow": spec.yarn.beta_slow if spec.yarn else 1.0,
    }


@pytest.mark.parametrize("kv_type", ("f16", "q8_0", "f32"))
def test_cache_size(open_model, kv_type):
    """Latent and rotated key only, padded to 64 values, with a row's scales; q8_0 keeps rotated keys in two bytes."""
    session = open_model(LITE).session(128, kv_type=kv_type)
    width = LITE.kv_lora_rank + LITE.rope
    row = {"f16": 2 * -(-width // 64) * 64 + 4, "q8_0": 64 + 4 + 2 * 64 + 4 + 4, "f32": 4 * width}[kv_type]
    assert session.kv_type == kv_type
    assert session.kv_bytes == 128 * LITE.n_layer * row


@pytest.mark.parametrize("spec", (MOE, MOE_SHARED), ids=lambda s: s.name)
@pytest.mark.parametrize("kv_type", ("f16", "q8_0", "f32"))
def test_cache_size_by_head(open_model, spec, kv_type):
    """A key and a value for each head that is cached, each padded to 64 values, with its scales."""
    row = {"f16": 2 * 64 + 4, "q8_0": 64 + 4 + 4 + 4, "f32": 4 * spec.v}[kv_type]
    assert open_model(spec).session(128, kv_type=kv_type).kv_bytes == 128 * spec.n_layer * spec.n_head_kv * 2 * row


@pytest.mark.parametrize("spec", (MOE, MOE_SHARED, spec_named("moe_one")), ids=lambda s: s.name)
@pytest.mark.parametrize("kv_type", ("f16", "q8_0"))
def test_plain_attention_over_coded_rows(open_model, spec, kv_type):
    """At depth, in one piece and token by token: coded rows cost what their steps are worth, and no more."""
    ref = reference(spec)
    ids, exact = firm_prompt(ref, spec, 300, seed=0)
    for cuts in ([], [270, *range(271, 300)]):
        got = in_pieces(open_model(spec).session(300, kv_type=kv_type), ids, cuts)
        error = np.sqrt(((got - exact) ** 2).mean(axis=-1)) / exact.std(axis=-1)
        assert np.median(error) < {"f16": 2e-4, "q8_0": 2e-2}[kv_type]


def test_same_input_same_bits(open_model):
    ids = tokens(PRO, 40)
    first, second = (in_pieces(open_model(PRO).session(64), ids, [38, 39]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_no_group_keys_means_no_groups(open_model):
    """The same weights with the group keys left out route over all experts."""
    spec = variant(PRO, name="pro_ungrouped", n_group=1, n_group_used=1)
    ids = tokens(spec, 32)
    expected = reference(spec).forward(ids)
    assert_close(open_model(spec).session(32, kv_type="f32").eval(ids, "all"), expected)
    grouped = open_model(PRO).session(32, kv_type="f32").eval(ids, "all")
    assert np.abs(grouped - expected).max() > 0.01 * np.ptp(expected)
