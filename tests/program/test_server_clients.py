"""One session each with the clients that people have: a chat, a stream, a tool's round, an answer of a form.

    pytest -m heavy tests/program/test_server_clients.py

Each Python client is tested where it is installed; those of Node where NODE_CLIENTS names a folder that holds them
(npm install openai ai @ai-sdk/openai-compatible @ai-sdk/openai @anthropic-ai/sdk ollama zod @openai/codex
@mariozechner/pi-coding-agent opencode-ai @qwen-code/qwen-code). The model is random: what it says is scripted, but for
the answers of a form, which a grammar writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.serving import USUAL, Served, scripted, served
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

pytestmark = pytest.mark.heavy

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["ant", "hill"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "get_weather", "description": "The weather", "parameters": CITY}
HI = [{"role": "user", "content": "Weather in Rome?"}]
ROUND = ("Hello to you", "Hello to you", CALL, "21 degrees")  # what a session hears: whole, streamed, a tool's round


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spec = variant(spec_named("lite"), n_ctx=1 << 16)  # agents say much before they ask
    path: Path = write_model(tmp_path_factory.mktemp("clients") / "tiny.gguf", spec, V25_TEMPLATE)
    with served(path, dataclasses.replace(USUAL, n_ctx=1 << 16)) as running:
        yield running


@pytest.fixture
def base(server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The server's address. No client finds a key, a setting or another server."""
    for name in list(os.environ):
        if name.startswith(("OPENAI", "ANTHROPIC", "OLLAMA", "LANGCHAIN", "LANGSMITH")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    return str(server.client.base_url).rstrip("/")


def check_form(text: Any) -> None:
    found = json.loads(text) if isinstance(text, str) else text
    assert found["name"] in ("ant", "hill") and 0 <= found["age"] <= 9


def test_openai_chat(server: Served, base: str) -> None:
    openai = pytest.importorskip("openai", reason="needs the client openai")
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="x", _strict_response_validation=True)
    chats = client.chat.completions
    assert [model.id for model in client.models.list()] == ["tiny"]
    tools: Any = [{"type": "function", "function": FUNCTION}]
    with scripted(server, *ROUND):
        assert chats.create(model="tiny", messages=HI).choices[0].message.content == ROUND[0]
        stream = chats.create(model="tiny", messages=HI, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ROUND[1]
        message = chats.create(model="tiny", messages=HI, tools=tools).choices[0].message
        [call] = message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
        answer = chats.create(model="tiny", messages=[*HI, message, result], tools=tools)
        assert answer.choices[0].message.content == ROUND[3]
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    check_form(chats.create(model="tiny", messages=HI, response_format=form).choices[0].message.content)


def test_openai_responses(server: Served, base: str) -> None:
    openai = pytest.importorskip("openai", reason="needs the client openai")
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="x", _strict_response_validation=True)
    tools: Any = [{"type": "function", "strict": True, **FUNCTION}]
    with scripted(server, *ROUND):
        first = client.responses.create(model="tiny", input="Hi", instructions="Be brief", metadata={"a": "b"})
        assert first.output_text == ROUND[0] and first.metadata == {"a": "b"} and first.status == "completed"
        with client.responses.stream(model="tiny", input="Hi", previous_response_id=first.id) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        assert "".join(deltas) == final.output_text == ROUND[1] and final.usage.input_tokens > first.usage.input_tokens
        asked = client.responses.create(model="tiny", input="Weather?", tools=tools)
        [call] = asked.output
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Rome"}
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
        last = client.responses.create(model="tiny", input=[result], previous_response_id=asked.id, tools=tools)
        assert last.output_text == ROUND[3]
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}
    check_form(client.responses.create(model="tiny", input="Hi", text=form).output_text)
    assert client.responses.retrieve(last.id).output_text == ROUND[3]
    kinds = [item.type for item in client.responses.input_items.list(last.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]
    assert client.responses.input_tokens.count(model="tiny", input="Hi").input_tokens > 3
    client.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.id)


def test_anthropic(server: Served, base: str) -> None:
    anthropic = pytest.importorskip("anthropic", reason="needs the client anthropic")
    messages = anthropic.Anthropic(base_url=base, api_key="x").messages
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": HI}
    tools: Any = [{"name": "get_weather", "description": "The weather", "input_schema": CITY}]
    with scripted(server, *ROUND):
        assert messages.create(**asked).content[0].text == ROUND[0]
        with messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == ROUND[1]
        called = messages.create(**asked, tools=tools)
        [use] = called.content
        assert use.input == {"city": "Rome"} and called.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "21"}
        history = [*HI, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        assert messages.create(**asked | {"messages": history}, tools=tools).content[0].text == ROUND[3]
    form: Any = [{"name": "answer", "description": "The answer", "input_schema": SCHEMA}]
    [use] = messages.create(**asked, tools=form, tool_choice={"type": "tool", "name": "answer"}).content
    check_form(use.input)
    begun = [*HI, {"role": "assistant", "content": "{"}]
    assert messages.create(**asked | {"messages": begun, "max_tokens": 3}).content[0].type == "text"
    assert messages.count_tokens(model="tiny", messages=HI).input_tokens > 3


def test_ollama(server: Served, base: str) -> None:
    ollama = pytest.importorskip("ollama", reason="needs the client ollama")
    client = ollama.Client(host=base)
    assert [model.model for model in client.list().models] == ["tiny"]
    tools = [{"type": "function", "function": FUNCTION}]
    with scripted(server, *ROUND):
        assert client.chat("tiny", HI).message.content == ROUND[0]
        assert "".join(part.message.content for part in client.chat("tiny", HI, stream=True)) == ROUND[1]
        message = client.chat("tiny", HI, tools=tools).message
        [call] = message.tool_calls
        assert call.function.name == "get_weather" and call.function.arguments == {"city": "Rome"}
        result = {"role": "tool", "tool_name": "get_weather", "content": "21"}
        assert client.chat("tiny", [*HI, message, result], tools=tools).message.content == ROUND[3]
    check_form(client.chat("tiny", HI, format=SCHEMA).message.content)


def test_llm(server: Served, base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llm = pytest.importorskip("llm", reason="needs the client llm")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: dsv2, model_name: tiny, api_base: '{base}/v1', supports_tools: true, supports_schema: true}}\n"
    )

    def get_weather(city: str) -> str:
        """The weather."""
        return "21" if city == "Rome" else "?"

    model = llm.get_model("dsv2")
    with scripted(server, *ROUND):
        assert model.prompt("Hi", stream=False, key="x").text() == ROUND[0]
        assert "".join(model.prompt("Hi", key="x")) == ROUND[1]
        assert model.chain("Weather?", tools=[get_weather], key="x").text().endswith(ROUND[3])
    check_form(model.prompt("Hi", schema=SCHEMA, key="x").text())


def test_langchain(server: Served, base: str) -> None:
    chat_openai = pytest.importorskip("langchain_openai", reason="needs the client langchain-openai").ChatOpenAI
    for way in (False, True):  # chat completions, responses
        model = chat_openai(base_url=f"{base}/v1", api_key="x", model="tiny", use_responses_api=way, max_retries=0)
        with scripted(server, *ROUND):
            assert model.invoke("Hi").text == ROUND[0]
            assert "".join(chunk.text for chunk in model.stream("Hi")) == ROUND[1]
            bound = model.bind_tools([{"type": "function", "function": FUNCTION}])
            called = bound.invoke("Weather?")
            [call] = called.tool_calls
            assert call["args"] == {"city": "Rome"}
            result = {"role": "tool", "tool_call_id": call["id"], "content": "21"}
            assert bound.invoke([("user", "Weather?"), called, result]).text == ROUND[3]
        form = {"title": "answer", "description": "an answer", **SCHEMA}
        check_form(model.with_structured_output(form, method="json_schema").invoke("Hi"))


def test_openai_agents(server: Served, base: str) -> None:
    """A whole run, with the model's calls carried out in between, over responses and over chats."""
    agents = pytest.importorskip("agents", reason="needs the client openai-agents")
    openai = pytest.importorskip("openai", reason="needs the client openai")
    agents.set_tracing_disabled(True)

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather."""
        return "21" if city == "Rome" else "?"

    client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="x")
    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        agent = agents.Agent(name="a", instructions="Help", tools=[get_weather], model=kind("tiny", client))
        with scripted(server, CALL, "21 degrees"):
            assert agents.Runner.run_sync(agent, "Weather?").final_output == "21 degrees"


def test_pydantic_ai(server: Served, base: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="needs the client pydantic-ai")
    from pydantic_ai.models import openai as models  # noqa: PLC0415
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

    provider = OpenAIProvider(base_url=f"{base}/v1", api_key="x")
    for kind in (models.OpenAIResponsesModel, models.OpenAIChatModel):
        agent = pydantic_ai.Agent(kind("tiny", provider=provider))

        @agent.tool_plain
        def get_weather(city: str) -> str:
            return "21" if city == "Rome" else "?"

        with scripted(server, CALL, "21 degrees"):
            assert agent.run_sync("Weather?").output == "21 degrees"


# Agents: a run each, with a command that the agent carries out.

CODEX = """
model = "tiny"
model_provider = "dsv2"
[model_providers.dsv2]
name = "dsv2"
base_url = "BASE/v1"
wire_api = "responses"
"""
PI = """
{"providers": {"dsv2": {"baseUrl": "BASE/v1", "api": "openai-completions", "apiKey": "x", "models": [{"id": "tiny"}]}}}
"""
OPENCODE = """
{"provider": {"dsv2": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "BASE/v1", "apiKey": "x"},
  "models": {"tiny": {}}}}}
"""

NO_PROXY = {"HTTP_PROXY": "", "HTTPS_PROXY": ""}  # for one that sends everything there


@dataclass(frozen=True)
class Agent:
    """command: its program first. file, settings: in its home. tool: what it calls its shell. n_before: answers to what
    it asks beside the run."""

    command: list[str]
    tool: str
    file: str = ""
    settings: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    n_before: int = 0


AGENTS = {
    "codex": Agent(
        ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"],
        '{"name": "exec_command", "arguments": {"cmd": "cat a.txt"}}',
        ".codex/config.toml",
        CODEX,
    ),
    "pi": Agent(
        ["pi", "--provider", "dsv2", "--model", "tiny", "-p"],
        '{"name": "bash", "arguments": {"command": "cat a.txt"}}',
        ".pi/agent/models.json",
        PI,
    ),
    "opencode": Agent(
        ["opencode", "run", "-m", "dsv2/tiny"],
        '{"name": "bash", "arguments": {"command": "cat a.txt", "description": "d"}}',
        ".config/opencode/opencode.json",
        OPENCODE,
        n_before=1,  # a title
    ),
    "qwen": Agent(
        ["qwen", "-y", "--auth-type", "openai", "-p"],
        '{"name": "run_shell_command", "arguments": {"command": "cat a.txt", "is_background": false}}',
        environment={"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": "BASE/v1", "OPENAI_MODEL": "tiny", **NO_PROXY},
    ),
}


@pytest.mark.parametrize("name", AGENTS)
def test_agents(server: Served, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    agent, service = AGENTS[name], server.serving.state.service
    assert service is not None
    told: list[Any] = []
    read = service.messages
    monkeypatch.setattr(service, "messages", lambda given: told.append(given) or read(given))
    program = shutil.which(
        agent.command[0], path=str(Path(os.environ.get("NODE_CLIENTS", "")) / "node_modules" / ".bin")
    )
    if program is None:
        pytest.skip(f"needs NODE_CLIENTS to name a folder with {name}")
    if agent.file:
        (tmp_path / agent.file).parent.mkdir(parents=True)
        (tmp_path / agent.file).write_text(agent.settings.replace("BASE", base))
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a.txt").write_text("21 degrees")
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9") | {"NO_PROXY": "127.0.0.1"}
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]} | nowhere
    environment |= {key: value.replace("BASE", base) for key, value in agent.environment.items()}
    call = f"<tool_call>\n{agent.tool}\n</tool_call>"
    with scripted(server, *[call] * (agent.n_before + 1), *["It is warm"] * 4):
        done = subprocess.run(
            [program, *agent.command[1:], "What does a.txt say?"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0 and done.stdout.strip() == "It is warm", done.stderr
    assert any("21 degrees" in str(messages) for messages in told)


# Node.

OPENAI_JS = """
import OpenAI from 'openai';
const client = new OpenAI({baseURL: BASE + '/v1', apiKey: 'x', maxRetries: 0});
const chats = client.chat.completions, model = 'tiny';
const whole = await chats.create({model, messages: HI});
say(whole.choices[0].message.content);
let text = '';
for await (const chunk of await chats.create({model, messages: HI, stream: true}))
  text += chunk.choices[0]?.delta?.content ?? '';
say(text);
const tools = [{type: 'function', function: FUNCTION}];
const {message} = (await chats.create({model, messages: HI, tools})).choices[0];
say(message.tool_calls[0].function.arguments);
const result = {role: 'tool', tool_call_id: message.tool_calls[0].id, content: '21'};
say((await chats.create({model, messages: [...HI, message, result], tools})).choices[0].message.content);
"""
RESPONSES_JS = """
import OpenAI from 'openai';
const client = new OpenAI({baseURL: BASE + '/v1', apiKey: 'x', maxRetries: 0});
const model = 'tiny', tools = [{type: 'function', strict: true, ...FUNCTION}];
const first = await client.responses.create({model, input: 'Hi'});
say(first.output_text);
const stream = client.responses.stream({model, input: 'Hi', previous_response_id: first.id});
let text = '';
for await (const event of stream) if (event.type === 'response.output_text.delta') text += event.delta;
await stream.finalResponse();
say(text);
const called = await client.responses.create({model, input: 'Weather?', tools});
say(called.output[0].arguments);
const input = [{type: 'function_call_output', call_id: called.output[0].call_id, output: '21'}];
say((await client.responses.create({model, input, previous_response_id: called.id, tools})).output_text);
"""
AI_SDK_JS = """
import {generateText, streamText, tool, stepCountIs, jsonSchema} from 'ai';
import {MAKE} from 'PACKAGE';
const model = MODEL;
say((await generateText({model, prompt: 'Hi', maxRetries: 0})).text);
let text = '';
for await (const part of streamText({model, prompt: 'Hi', maxRetries: 0}).textStream) text += part;
say(text);
const get_weather = tool({description: 'd', inputSchema: jsonSchema(FUNCTION.parameters),
  execute: async ({city}) => { say(JSON.stringify({city})); return '21'; }});
const asked = {model, prompt: 'Weather?', tools: {get_weather}, maxRetries: 0};
const done = await generateText({...asked, stopWhen: stepCountIs(3)});
say(done.text);
"""
ANTHROPIC_JS = """
import Anthropic from '@anthropic-ai/sdk';
const client = new Anthropic({baseURL: BASE, apiKey: 'x', maxRetries: 0});
const asked = {model: 'tiny', max_tokens: 200, messages: HI};
say((await client.messages.create(asked)).content[0].text);
let text = '';
for await (const event of client.messages.stream(asked))
  if (event.type === 'content_block_delta') text += event.delta.text ?? '';
say(text);
const tools = [{name: 'get_weather', description: 'd', input_schema: FUNCTION.parameters}];
const {content} = await client.messages.create({...asked, tools});
say(JSON.stringify(content[0].input));
const result = {role: 'user', content: [{type: 'tool_result', tool_use_id: content[0].id, content: '21'}]};
const messages = [...HI, {role: 'assistant', content}, result];
say((await client.messages.create({...asked, messages, tools})).content[0].text);
"""
OLLAMA_JS = """
import {Ollama} from 'ollama';
const client = new Ollama({host: BASE}), model = 'tiny';
say((await client.chat({model, messages: HI})).message.content);
let text = '';
for await (const part of await client.chat({model, messages: HI, stream: true})) text += part.message.content;
say(text);
const tools = [{type: 'function', function: FUNCTION}];
const {message} = await client.chat({model, messages: HI, tools});
say(JSON.stringify(message.tool_calls[0].function.arguments));
const result = {role: 'tool', tool_name: 'get_weather', content: '21'};
say((await client.chat({model, messages: [...HI, message, result], tools})).message.content);
"""


def ai_sdk(package: str, make: str, model: str) -> str:
    return AI_SDK_JS.replace("PACKAGE", package).replace("MAKE", make).replace("MODEL", model)


SESSIONS = {
    "openai": OPENAI_JS,
    "openai-responses": RESPONSES_JS,
    "ai-sdk-compatible": ai_sdk(
        "@ai-sdk/openai-compatible",
        "createOpenAICompatible",
        "createOpenAICompatible({name: 'dsv2', baseURL: BASE + '/v1'})('tiny')",
    ),
    "ai-sdk-responses": ai_sdk(
        "@ai-sdk/openai", "createOpenAI", "createOpenAI({baseURL: BASE + '/v1', apiKey: 'x'}).responses('tiny')"
    ),
    "anthropic": ANTHROPIC_JS,
    "ollama": OLLAMA_JS,
}


@pytest.mark.parametrize("client", SESSIONS)
def test_node(server: Served, base: str, client: str) -> None:
    folder, node = os.environ.get("NODE_CLIENTS"), shutil.which("node")
    if folder is None or node is None:
        pytest.skip("needs node, and NODE_CLIENTS to name a folder with the clients")
    constants = {"BASE": base, "HI": HI, "FUNCTION": FUNCTION}
    lines = [f"const {name} = {json.dumps(value)};" for name, value in constants.items()]
    script = "\n".join([*lines, "const say = (text) => console.log(JSON.stringify(text));", SESSIONS[client]])
    with scripted(server, *ROUND):
        command = [node, "--input-type=module", "-e", script]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [said[0], said[1], json.loads(said[2]), said[3]] == [ROUND[0], ROUND[1], {"city": "Rome"}, ROUND[3]]
