"""A thousand schemas drawn at random: no mask lets an instance pass that jsonschema refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

from cext.tokenizer import Tokenizer
from dsv2cli.server import trial
from dsv2cli.server.constraints import Grammars, Matching
from dsv2cli.server.errors import ApiError
from dsv2cli.server.generation import Constraint

jsonschema: Any = pytest.importorskip("jsonschema")

SEEDS = range(10)
SCHEMAS, INSTANCES, WALKS, LONGEST = 100, 8, 2, 300
WORDS = ("a", "b", "size", "name", "né", 'q"', "x y")
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 7, 12, 99, 1.5, "", "a", "ab1", "né", [], [1], {}, {"a": 1})
PATTERNS = ("^[a-c]+$", "^x?[0-9]{2}$", "b", "^(ab|cd)*$")


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grammars, Tokenizer]:
    path: Path = tmp_path_factory.mktemp("schemas") / "tiny.gguf"
    tokenizer = Tokenizer(write_model(path, variant(spec_named("lite"), n_ctx=64), V25_TEMPLATE))
    return Grammars(tokenizer, [ends(tokenizer)]), tokenizer


def ends(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos is not None
    return tokenizer.eos


FLAT: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "string": lambda rng: {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(2, 6)},
    "pattern": lambda rng: {"type": "string", "pattern": rng.choice(PATTERNS)},
    "integer": lambda rng: {"type": "integer"} | bounds(rng) | rng.choice(({}, {"multipleOf": 3})),
    "number": lambda rng: {"type": "number"} | bounds(rng),
    "plain": lambda rng: {"type": rng.choice(("boolean", "null", "string", "integer", ["string", "null"]))},
    "enum": lambda rng: {"enum": rng.sample(VALUES, 3)},
    "const": lambda rng: {"const": rng.choice(VALUES)},
    "allOf": lambda rng: {
        "allOf": [{"type": "integer", "minimum": rng.randrange(9)}, {"maximum": rng.randrange(9, 99)}]
    },
}
DEEP: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "array": lambda rng, depth: (
        {"type": "array", "items": drawn_schema(rng, depth)}
        | {"minItems": rng.randrange(3), "maxItems": rng.randrange(2, 5)}
    ),
    "tuple": lambda rng, depth: (
        {"type": "array", "prefixItems": [drawn_schema(rng, depth) for _ in range(2)]}
        | {"items": False, "minItems": rng.randrange(3)}
    ),
    "anyOf": lambda rng, depth: {"anyOf": [drawn_schema(rng, depth) for _ in range(2)]},
    "object": lambda rng, depth: members(rng, depth) | {"additionalProperties": False},
    "open": lambda rng, depth: members(rng, depth) | {"additionalProperties": drawn_schema(rng, 0)},
}


def bounds(rng: random.Random) -> dict[str, Any]:
    low, high = sorted(rng.sample(range(-20, 120), 2))
    lows, highs = rng.choice(("minimum", "exclusiveMinimum")), rng.choice(("maximum", "exclusiveMaximum"))
    return {lows: low, highs: high + 2}


def members(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(1, 4))
    inner = {name: drawn_schema(rng, depth) for name in names}
    return {"type": "object", "properties": inner, "required": [name for name in names if rng.random() < 0.6]}


def drawn_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    if depth and rng.random() < 0.6:
        return DEEP[rng.choice(list(DEEP))](rng, depth - 1)
    return FLAT[rng.choice(list(FLAT))](rng)


def text_near(rng: random.Random, _: Any) -> str:
    return rng.choice(("abc", "cab", "12", "x12", "b", "", "abcd", "ab", "nééé", 'q"\\', "line\nline", "\U0001f600"))


def number_near(rng: random.Random, schema: Any) -> float:
    edges = [schema[key] for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum") if key in schema]
    value = int(rng.choice(edges or [0])) + rng.choice((-3, -1, 0, 1, 2, 3))
    return value + 0.5 if schema.get("type") == "number" and rng.random() < 0.5 else value


def items_near(rng: random.Random, schema: Any) -> list[Any]:
    first = [drawn_instance(rng, item) for item in schema.get("prefixItems", ())]
    n = rng.randrange(max(0, schema["minItems"] - 1), schema.get("maxItems", 2) + 2)
    return (first + [drawn_instance(rng, schema["items"]) for _ in range(n - len(first))])[:n]


def members_near(rng: random.Random, schema: Any) -> dict[str, Any]:
    made = {}
    for name, inner in schema["properties"].items():
        if rng.random() < (0.93 if name in schema["required"] else 0.5):
            made[name] = drawn_instance(rng, inner)
    if rng.random() < 0.3:
        made[rng.choice((*WORDS, "more"))] = drawn_instance(rng, schema["additionalProperties"])
    return made


NEAR: dict[str, Callable[[random.Random, Any], Any]] = {
    "string": text_near,
    "integer": number_near,
    "number": number_near,
    "boolean": lambda rng, _: rng.random() < 0.5,
    "null": lambda *_: None,
    "array": items_near,
    "object": members_near,
}


def drawn_instance(rng: random.Random, schema: Any) -> Any:
    """Of a schema as a rule, and often just beside it."""
    if not isinstance(schema, dict) or rng.random() < 0.06:
        return rng.choice(VALUES)
    if inner := schema.get("anyOf") or schema.get("allOf"):
        return drawn_instance(rng, rng.choice(inner))
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    kind = schema.get("type", "integer")
    return NEAR[rng.choice(kind) if isinstance(kind, list) else kind](rng, schema)


def allowed(constraint: Constraint, n_vocab: int) -> Any:
    logits = np.zeros(n_vocab, np.float32)
    constraint.mask(logits)
    return np.isfinite(logits)


def passes(constraint: Constraint, ids: list[int], n_vocab: int) -> bool:
    """Whether the masks let these tokens pass, one after another, the last one too."""
    for token in ids:
        if not allowed(constraint, n_vocab)[token]:
            return False
        constraint.accept(token)
    return True


def walked(rng: random.Random, constraint: Constraint, tokenizer: Tokenizer) -> str | None:
    """What comes of any tokens that the masks allow, the end soon; None where it is not at its end in time."""
    closing = [token for text in ('"', "}", "]", ",") for token in tokenizer.encode(text)[-1:]]
    ids: list[int] = []
    while len(ids) < LONGEST:
        may = allowed(constraint, tokenizer.n_vocab)
        if may[ends(tokenizer)]:
            return b"".join(map(tokenizer.token_bytes, ids)).decode()  # of whole characters, whatever they are made of
        near = [token for token in closing if may[token]]
        token = rng.choice(near) if near and rng.random() < 0.4 else int(rng.choice(np.flatnonzero(may)))
        constraint.accept(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_no_wrong_instance_passes(
    grammars: tuple[Grammars, Tokenizer], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "tried", lambda kind, text: (text, ""))  # a process for each: what it tells is known
    compiler, tokenizer = grammars
    rng, counts = random.Random(seed), dict.fromkeys(("refused", "wrong", "right", "right refused", "walks"), 0)
    for _ in range(SCHEMAS):
        schema = drawn_schema(rng)
        oracle = jsonschema.Draft202012Validator(schema)
        try:
            made = compiler.compiled(compiler.schema(schema, "schema"), "schema")
        except ApiError:
            counts["refused"] += 1  # nothing can be of it, or it asks for what is not supported: told, not overlooked
            continue
        for _ in range(INSTANCES):
            instance = drawn_instance(rng, schema)
            text = json.dumps(instance, ensure_ascii=False)
            passed = passes(made(), [*tokenizer.encode(text), ends(tokenizer)], tokenizer.n_vocab)
            is_right = oracle.is_valid(instance)
            counts["right" if is_right else "wrong"] += 1
            counts["right refused"] += is_right and not passed
            assert is_right or not passed, (schema, text)
        for _ in range(WALKS):
            written = walked(rng, made(), tokenizer)
            if written is not None:
                counts["walks"] += 1
                assert oracle.is_valid(json.loads(written)), (schema, written)
    print(counts)
    assert counts["refused"] < SCHEMAS / 5, counts
    assert counts["wrong"] > SCHEMAS and counts["right"] > SCHEMAS and counts["walks"] > SCHEMAS, counts
    assert counts["right refused"] < counts["right"] / 5, counts


def test_a_mask_that_lets_all_pass_would_be_seen(grammars: tuple[Grammars, Tokenizer]) -> None:
    compiler, tokenizer = grammars
    made = compiler.compiled(compiler.schema({"type": "integer", "maximum": 5}, "schema"), "schema")
    assert isinstance(made(), Matching)
    said = {text: passes(made(), [*tokenizer.encode(text), ends(tokenizer)], tokenizer.n_vocab) for text in ("5", "6")}
    assert said == {"5": True, "6": False}
