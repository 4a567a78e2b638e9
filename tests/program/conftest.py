"""What the tests of commands start from, unless they have models of their own."""

from pathlib import Path

import pytest
from support.tiny import spec_named, variant
from support.vocab import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A tiny model with a vocabulary, whose context is of 4,096 tokens."""
    return write_model(folder / "tiny.gguf", variant(spec_named("lite"), n_ctx=4096))
