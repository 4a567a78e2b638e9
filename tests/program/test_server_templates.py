"""Chat templates by name write what llama.cpp's own of that name do."""

from __future__ import annotations

import ctypes

import llama_cpp
import pytest

from cext.template import render
from cext.traced import written
from dsv2cli.server.templates import NAMED

HI = [("user", " Hi, \n<|im_end|>{{ x }}")]
CHATS = (
    HI,
    [("system", " Be brief.\n"), *HI],
    [("system", "Be brief."), *HI, ("assistant", " Sure. "), ("user", "More")],
    [*HI, ("assistant", "\n Sure. "), ("user", "More"), ("assistant", "No.")],
)


def theirs(name: str, chat: list[tuple[str, str]], answer: bool) -> str:
    messages = [llama_cpp.llama_chat_message(role=role.encode(), content=text.encode()) for role, text in chat]
    given = (llama_cpp.llama_chat_message * len(messages))(*messages)
    room = ctypes.create_string_buffer(10_000)
    n = llama_cpp.llama_chat_apply_template(name.encode(), given, len(messages), answer, room, len(room))
    assert 0 <= n < len(room)
    return room.raw[:n].decode()


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_writes_what_llama_cpps_does(name: str) -> None:
    for chat in CHATS:
        messages = [{"role": written(role), "content": text} for role, text in chat]
        for answer in (False, True):
            ours = render(NAMED[name].source, {"messages": messages, "add_generation_prompt": answer})
            assert str(ours) == theirs(name, chat, answer), (chat, answer)
