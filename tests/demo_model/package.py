"""The trained weights as a checkpoint folder that `dsv2 quantize` takes.

usage: package.py TRAINED_FOLDER TOKENIZER.json OUT_FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

from model import CONTEXT
from vocabulary import ASSISTANT, BOS, CONTROL, EOS, USER

TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT' }}{% endif %}"
)
LICENSE = "---\nlicense: cc0-1.0\n---\n# dsv2-demo-52m\n\nThe demonstration model of dsv2: see dsv2cli/models/README.md there.\n"


def main(trained: Path, tokenizer: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(trained / name, out)
    shutil.copy(tokenizer, out / "tokenizer.json")
    user, assistant = CONTROL[USER - BOS], CONTROL[ASSISTANT - BOS]
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": CONTROL[0], "eos_token": CONTROL[1], "pad_token": CONTROL[1], "unk_token": None,
        "clean_up_tokenization_spaces": False, "legacy": True, "model_max_length": CONTEXT, "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": TEMPLATE.replace("USER", user).replace("ASSISTANT", assistant),
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
    (out / "README.md").write_text(LICENSE)


if __name__ == "__main__":
    main(*(Path(x) for x in sys.argv[1:4]))
