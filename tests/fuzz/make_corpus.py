"""Writes the fuzzer's seeds: valid files and every hostile file of the tests. Usage: make_corpus.py DIRECTORY"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf.constants import GGML_QUANT_SIZES
from support import gguf_bytes
from support.gguf_hostile import HOSTILE

MAX_SEED_BYTES = 1 << 16  # a longer seed slows every mutation of it


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    seeds = {f"hostile-{case.name}": case.content for case in HOSTILE}
    seeds |= {f"small-v{version}": gguf_bytes.small_file(version) for version in (2, 3)}
    for kind, (elements, _) in GGML_QUANT_SIZES.items():
        seeds[f"tiny-model-{kind.name.lower()}"] = gguf_bytes.tiny_model(kind, max(32, elements)).content()
    seeds["tiny-mistral4"] = gguf_bytes.tiny_mistral4().content()
    for name, content in seeds.items():
        if len(content) <= MAX_SEED_BYTES:
            (out / f"{name}.gguf").write_bytes(content)


if __name__ == "__main__":
    main()
