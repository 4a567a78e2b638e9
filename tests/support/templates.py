# ruff: noqa: E501  (a line break is a part of a template)
"""Chat templates with the features of the family's published ones, and a vocabulary that has all their markers.

Written for these tests: each does what its namesake's does with messages (the same tests, cuts, joins, macros, filters
and variables), in fewer words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny import write_tensors
from support.vocab import CONTROL, SPECIALS, USER_DEFINED, vocabulary

V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
V25 = """\
{%- set ns = namespace(system='') -%}
{%- for m in messages if m['role'] == 'system' -%}{%- set ns.system = m['content'] -%}{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}{{- '<｜Assistant｜>' + (m['content'] or '') + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""
R1 = """\
{%- set ns = namespace(is_tool=false, is_first=true, system='') -%}
{%- for m in messages -%}{%- if m['role'] == 'system' -%}
{%- if ns.is_first -%}{%- set ns.system = ns.system + m['content'] -%}{%- set ns.is_first = false -%}
{%- else -%}{%- set ns.system = ns.system + '\\n\\n' + m['content'] -%}{%- endif -%}
{%- endif -%}{%- endfor -%}
{{- bos_token -}}{{- ns.system -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{%- set ns.is_tool = false -%}{{- '<｜User｜>' + m['content'] -}}{%- endif -%}
{%- if m['role'] == 'assistant' and m['tool_calls'] is defined -%}
{%- set ns.is_tool = false -%}
{%- for call in m['tool_calls'] -%}
{{- ('<｜Assistant｜><｜tool▁calls▁begin｜>' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + call['type'] -}}
{{- '<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```' -}}
{{- '<｜tool▁call▁end｜>' -}}
{%- endfor -%}{{- '<｜tool▁calls▁end｜>' + eos_token -}}
{%- elif m['role'] == 'assistant' -%}
{%- set content = m['content'] -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{%- if ns.is_tool -%}{{- '<｜tool▁outputs▁end｜>' + content + eos_token -}}{%- set ns.is_tool = false -%}
{%- else -%}{{- '<｜Assistant｜>' + content + eos_token -}}{%- endif -%}
{%- endif -%}
{%- if m['role'] == 'tool' -%}
{{- '\\n' if ns.is_tool else '<｜tool▁outputs▁begin｜>' -}}{%- set ns.is_tool = true -%}
{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if ns.is_tool -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if add_generation_prompt and not ns.is_tool -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
V31 = """\
{%- if not thinking is defined -%}{%- set thinking = false -%}{%- endif -%}
{%- set ns = namespace(is_last_user=false) -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- m['content'] -}}
{%- elif m['role'] == 'user' -%}{%- set ns.is_last_user = true -%}{{- '<｜User｜>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}
{%- if ns.is_last_user -%}{{- '<｜Assistant｜>' -}}
{%- if m['prefix'] is defined and m['prefix'] and thinking -%}{{- '<think>' -}}{%- else -%}{{- '</think>' -}}{%- endif -%}
{%- endif -%}
{%- set ns.is_last_user = false -%}
{%- set content = m['content'] -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>', 1)[1] -%}{%- endif -%}
{{- content + '<｜end▁of▁sentence｜>' -}}
{%- elif m['role'] == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.is_last_user -%}
{{- '<｜Assistant｜>' -}}{%- if not thinking -%}{{- '</think>' -}}{%- else -%}{{- '<think>' -}}{%- endif -%}
{%- endif -%}
"""
V32 = """\
{%- set enable_thinking = enable_thinking | default(true) -%}
{%- set bos_token = "<｜begin▁of▁sentence｜>" -%}{%- set open = "<think>" -%}{%- set close = "</think>" -%}
{%- set mark = "｜DSML｜" -%}
{%- macro show_tools(tools) -%}
## Tools{{- "\\n\\n" -}}<{{ mark }}functions>
{%- for tool in tools -%}{{ "\\n" }}{{ tool | tojson(ensure_ascii=False) }}{%- endfor -%}
</{{ mark }}functions>
{%- endmacro -%}
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role in ["user", "developer"] -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{ bos_token }}
{%- for m in messages -%}
{%- if m.role == "system" -%}{{ m.get('content', '') }}{%- if tools -%}{{ show_tools(tools) }}{%- endif -%}
{%- elif m.role == "user" -%}<｜User｜>{{ m.content }}<｜Assistant｜>
{%- if loop.index0 == last.user and enable_thinking -%}{{ open }}{%- else -%}{{ close }}{%- endif -%}
{%- elif m.role == "tool" -%}{{ "\\n" }}<result>{{ m.content }}</result>
{%- elif m.role == "assistant" -%}
{%- if enable_thinking and loop.index0 > last.user -%}{{ m.get('reasoning_content', '') }}{{ close }}{%- endif -%}
{{ m.get('content', '') }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
"""
MOONLIGHT = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "{{'<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>'}}{%- endif -%}"
    "{%- if message['role'] == 'system' -%}{{'<|im_system|>'}}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{{'<|im_user|>'}}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{'<|im_assistant|>'}}{%- endif -%}"
    "{{- message['role'] -}}{{'<|im_middle|>'}}{{message['content'] + '<|im_end|>'}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<|im_assistant|>assistant<|im_middle|>'}}{%- endif -%}"
)
K2 = """\
{% if tools -%}{{ '<|im_system|>tool_declare<|im_middle|>' -}}{{- tools | tojson -}}{{ '<|im_end|>' -}}{%- endif -%}
{%- for m in messages -%}
  {%- if m['role'] == 'system' or m['role'] == 'tool' -%}{{ '<|im_system|>' ~ m['role'] ~ '<|im_middle|>' }}
  {%- elif m['role'] == 'user' -%}{{ '<|im_user|>user<|im_middle|>' }}
  {%- else -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}
  {%- if m['content'] is string -%}{{- m['content'] + '<|im_end|>' -}}
  {%- else -%}
    {%- for content in m['content'] -%}
      {%- if content['type'] == 'image' or 'image_url' in content -%}{{ '<|media_start|>image<|media_end|>' }}
      {%- else -%}{{ content['text'] }}{%- endif -%}
    {%- endfor -%}{{ '<|im_end|>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}
"""
K2_THINKING = """\
{%- macro content_of(m) -%}
  {%- set c = m.get('content') -%}
  {%- if c is string -%}{{ c }}
  {%- elif c is not none -%}{% for part in c -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{% macro head(m) -%}
  {%- set name = m.get('name') or m['role'] -%}
  {%- if m['role'] == 'user' -%}<|im_user|>{{name}}<|im_middle|>
  {%- elif m['role'] == 'assistant' -%}<|im_assistant|>{{name}}<|im_middle|>
  {%- else -%}<|im_system|>{{name}}<|im_middle|>{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for i in range(messages|length - 1, -1, -1) -%}
  {%- if messages[i]['role'] == 'assistant' and not messages[i].get('tool_calls') -%}
    {%- set ns.last = i -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- for m in messages[:ns.last + 1] + messages[ns.last + 1:] -%}
  {{head(m)}}
  {%- if m['role'] == 'assistant' -%}
    {%- if loop.index0 <= ns.last -%}<think></think>
    {%- else -%}<think>{{m.get('reasoning_content', '')}}</think>{%- endif -%}
    {{content_of(m)}}
    {%- for call in m.get('tool_calls', []) -%}
      <|tool_call_begin|>{{ call['id'] }}{{ call['function']['arguments'] | tojson }}<|tool_call_end|>
    {%- endfor -%}
  {%- elif m['role'] == 'tool' -%}## Return of {{ m.tool_call_id }}
{{content_of(m)}}
  {%- else -%}{{content_of(m)}}{%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
GLM = """\
[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>{%- endif -%}
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}
            {%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning = '' %}{%- set content = visible(m.content) %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
    {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and reasoning -%}{{ '\\n<think>' + reasoning.strip() + '</think>'}}
{%- else -%}{{ '\\n<think></think>' }}{%- endif -%}
{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
{% for call in m.tool_calls or [] %}
{{ '\\n<tool_call>' + call.function.name }}
{% for k, v in call.function.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|observation|>' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
{%- elif m.role == 'system' -%}<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
"""
GIGACHAT = """\
{%- macro kind(schema, indent="", factor=2) -%}
  {%- if schema.get("type") == "object" -%}
    {{- "{\\n" -}}
    {%- for key, val in schema.get("properties", {}).items() -%}
      {%- if "description" in val -%}
        {%- for line in val['description'].split('\\n') -%}{%- if line.strip() -%}{{- indent + '// ' + line + '\\n' -}}{%- endif -%}
        {%- endfor -%}
      {%- endif -%}
      {%- set inner = kind(val, indent + (' ' * factor), factor) -%}
      {{- indent + key + ('' if key in schema.get('required', []) else '?') + ': ' + inner + ',\\n' -}}
    {%- endfor -%}
    {{- indent[:-factor] + '}' -}}
  {%- elif schema.get("enum") -%}
    {%- set ns = namespace(values=[]) -%}
    {%- for each in schema['enum'] -%}{%- set ns.values = ns.values + ['"' ~ each ~ '"'] -%}{%- endfor -%}
    {{- ns.values | join(' | ') -}}
  {%- else -%}{{- schema.get("type", "any") -}}{%- endif -%}
{%- endmacro -%}
{%- set tokens = namespace(role="<|role_sep|>\\n", message="<|message_sep|>\\n\\n") -%}
{%- macro show(m, role=None) -%}
  {%- set content = m['content'] or '' -%}
  {%- if content is not string -%}{%- set content = content | tojson(ensure_ascii=False) -%}{%- endif -%}
  {{- (role or m['role']) + tokens.role + content + tokens.message -}}
{%- endmacro -%}
{%- set PREAMBLE -%}
<role_description>
`system`, `user`, `assistant`
</role_description>
{%- endset -%}
{{- bos_token -}}{{- show({"role": "developer system", "content": PREAMBLE}) -}}
{%- if messages and messages[0]['role'] == 'system' -%}{{- show(messages[0]) -}}{%- set messages = messages[1:] -%}{%- endif -%}
{%- if tools -%}
  {%- set ns = namespace(lines=['namespace functions {']) -%}
  {%- for tool in tools -%}
    {%- set ns.lines = ns.lines + ['type ' ~ tool.function.name ~ ' = (_: ' ~ kind(tool.function.parameters, "  ") ~ ') => any;'] -%}
  {%- endfor -%}
  {{- show({'role': 'function descriptions', 'content': (ns.lines + ['}']) | join('\\n')}) -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m['role'] == 'tool' -%}{{- show(m, role='function result') -}}{%- else -%}{{- show(m) -}}{%- endif -%}
  {%- if loop.last and add_generation_prompt and m['role'] != 'assistant' -%}{{- 'assistant' + tokens.role -}}{%- endif -%}
{%- endfor -%}
"""
MISTRAL = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
{%- set rest = messages[1:] %}{%- else %}
{{- '[SYSTEM_PROMPT]' + 'Today is {}, %s.'.format(strftime_now('%Y')) % 'and so on' + '[/SYSTEM_PROMPT]' }}{%- set rest = messages %}
{%- endif %}
{%- for m in rest %}
{%- if m['role'] == 'system' %}{%- continue %}{%- endif %}
{%- if m['role'] == 'user' %}{{- '[INST]' ~ m['content'] ~ '[/INST]' }}
{%- elif m['role'] == 'assistant' %}{% generation %}{{- m['content'] | trim + eos_token }}{% endgeneration %}
{%- elif m['role'] == 'tool' %}{{- '[TOOL_RESULTS]' + m['content'] + '[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('Only user, assistant and tool roles are supported!') }}{%- endif %}
{%- endfor %}
"""

FAMILIES = {
    "v2": V2, "v2.5": V25, "r1": R1, "v3.1": V31, "v3.2": V32, "moonlight": MOONLIGHT, "k2": K2,
    "k2-thinking": K2_THINKING, "glm": GLM, "gigachat": GIGACHAT, "mistral": MISTRAL,
}  # fmt: skip
WITH_TOOLS = ("r1", "v3.2", "k2", "k2-thinking", "glm", "gigachat")  # what shows tools or their calls
WITH_PARTS = ("k2", "k2-thinking", "glm", "gigachat")  # what takes content in parts

NAMES = (
    "calls▁begin",
    "calls▁end",
    "call▁begin",
    "call▁end",
    "outputs▁begin",
    "outputs▁end",
    "output▁begin",
    "output▁end",
)
MARKERS = [
    *((f"<｜tool▁{name}｜>", USER_DEFINED) for name in (*NAMES, "sep")),
    *((f"<|im_{name}|>", CONTROL) for name in ("system", "user", "assistant", "middle", "end")),
    *((f"<|{name}|>", CONTROL) for name in ("media_start", "media_end", "tool_call_begin", "tool_call_end")),
    *((f"<|{name}|>", CONTROL) for name in ("system", "user", "assistant", "observation", "role_sep", "message_sep")),
    *((text, CONTROL) for text in ("[gMASK]", "<sop>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    *((text, CONTROL) for text in ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
    *((text, USER_DEFINED) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>", "｜DSML｜")),
    *((f"<{slash}{name}>", USER_DEFINED) for slash in ("", "/") for name in ("arg_key", "arg_value", "tool_response")),
    *((f"<｜fim▁{name}｜>", CONTROL) for name in ("begin", "hole", "end")),
    ("β", USER_DEFINED),  # a letter: as of the kind that DeepSeek-V2 has
]
STRUCTURE = [text for text, _ in [*SPECIALS, *MARKERS] if text != "β"]


def family_keys(template: str | None, **changes: Any) -> dict[str, Any]:
    """The tokenizer keys of a GGUF whose vocabulary has every marker."""
    keys = vocabulary(template)
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + [text for text, _ in MARKERS]
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [kind for _, kind in MARKERS]
    keys |= {f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


def write_family(path: Path, template: str | None, **changes: Any) -> Path:
    """A GGUF that holds this vocabulary and no weights."""
    return write_tensors(path, family_keys(template, **changes), {})
