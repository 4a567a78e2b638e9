"""Chat templates by the names that llama.cpp knows them by, for files that bring none or a wrong one."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Turns:
    """What stands before and behind a message of each role, and what an answer begins with.

    begin: what opens each turn of a system's, a user's and an assistant's message together. trims: contents lose the
    space around them; of the assistant's alone: its name.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str = ""
    begin: str = ""
    trims: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """As Jinja."""
        lines = ["{%- set turn = namespace(begun=false) %}{%- for message in messages %}"]
        if self.begin:
            lines.append(f"{{%- if not turn.begun %}}{{{{ {_text(self.begin)} }}}}{{% endif %}}")
        for i, role in enumerate(("system", "user", "assistant")):
            before, behind = getattr(self, role)
            content = "message.content | trim" if role in self.trims else "message.content"
            lines.append(f"{{%- {'elif' if i else 'if'} message.role == '{role}' %}}")
            lines.append(f"{{{{- {_text(before)} + ({content}) + {_text(behind)} }}}}")
        lines.append("{%- endif %}{%- set turn.begun = message.role != 'assistant' %}{%- endfor %}")
        lines.append(f"{{%- if add_generation_prompt %}}{{{{- {_text(self.answer)} }}}}{{% endif %}}")
        return "".join(lines)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _alike(begin: str, end: str, answer: str | None = None, trims: bool = False) -> Turns:
    """Every role's messages in the same form, with the role's name in place of ROLE."""
    system, user, assistant = ((begin.replace("ROLE", role), end) for role in ROLES)
    return Turns(system, user, assistant, assistant[0] if answer is None else answer, trims=ROLES if trims else ())


def _llama2(system: tuple[str, str]) -> Turns:
    return Turns(system, ("", " [/INST]"), ("", "</s>"), begin="[INST] ")


ROLES = ("system", "user", "assistant")
COHERE, COHERE_END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
NAMED = {
    "chatml": _alike("<|im_start|>ROLE\n", "<|im_end|>\n"),
    "llama2": _llama2(("", "\n")),
    "llama2-sys": _llama2(("<<SYS>>\n", "\n<</SYS>>\n\n")),
    "llama3": _alike("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", trims=True),
    "mistral-v1": Turns(("", "\n\n"), ("", " [/INST]"), (" ", "</s>"), begin=" [INST] "),
    "mistral-v3": Turns(("", "\n\n"), ("", "[/INST]"), (" ", "</s>"), begin="[INST] ", trims=("assistant",)),
    "mistral-v3-tekken": Turns(("", "\n\n"), ("", "[/INST]"), ("", "</s>"), begin="[INST]"),
    "mistral-v7": Turns(("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"), ("[INST] ", "[/INST]"), (" ", "</s>")),
    "mistral-v7-tekken": Turns(("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), ("", "</s>")),
    "phi3": _alike("<|ROLE|>\n", "<|end|>\n"),
    "phi4": _alike("<|im_start|>ROLE<|im_sep|>", "<|im_end|>"),
    "falcon3": _alike("<|ROLE|>\n", "\n"),
    "zephyr": _alike("<|ROLE|>\n", "<|endoftext|>\n"),
    "openchat": Turns(
        ("", "<|end_of_turn|>"),
        ("GPT4 Correct User: ", "<|end_of_turn|>"),
        ("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        "GPT4 Correct Assistant:",
    ),
    "vicuna": Turns(("", "\n\n"), ("USER: ", "\n"), ("ASSISTANT: ", "</s>\n"), "ASSISTANT:"),
    "vicuna-orca": Turns(("SYSTEM: ", "\n"), ("USER: ", "\n"), ("ASSISTANT: ", "</s>\n"), "ASSISTANT:"),
    "deepseek": Turns(("", ""), ("### Instruction:\n", "\n"), ("### Response:\n", "\n<|EOT|>\n"), "### Response:\n"),
    "deepseek2": Turns(("", "\n\n"), ("User: ", "\n\n"), ("Assistant: ", "<｜end▁of▁sentence｜>"), "Assistant:"),
    "deepseek3": Turns(
        ("", "\n\n"), ("<｜User｜>", ""), ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"), "<｜Assistant｜>"
    ),
    "command-r": Turns(
        (f"{COHERE}<|SYSTEM_TOKEN|>", COHERE_END),
        (f"{COHERE}<|USER_TOKEN|>", COHERE_END),
        (f"{COHERE}<|CHATBOT_TOKEN|>", COHERE_END),
        f"{COHERE}<|CHATBOT_TOKEN|>",
        trims=ROLES,
    ),
}
