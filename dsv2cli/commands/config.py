"""dsv2 config: what options are set to where no command line says it, and where that comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dsv2cli import console, options
from dsv2cli.errors import UsageError

HELP = (
    "Show and change what options are set to where the command line does not say: by your own file, a project's"
    " .dsv2.toml, or the environment (DSV2_KV, DSV2_CHAT_TEMP), the later before the earlier. A KEY is of every command"
    " that has the option (temp of chat, serve and batch alike), chat.KEY of that one alone; presets.NAME.KEY is of a"
    " preset: what chat --preset NAME takes together."
)
EXAMPLES = (
    "config",
    "config set kv q8_0",
    "config set chat.temp 0.5",
    "config set presets.coder.temp 0.2",
    "config get chat.kv",
    "config unset kv",
    "config path",
)
Action = Literal["list", "get", "set", "unset", "path"]
ACTION = typer.Argument(metavar="[list|get|set|unset|path]", help="What to do.", show_default=False)
KEY = typer.Argument(
    metavar="KEY", help="An option for all commands, as kv, or for one, as chat.kv.", show_default=False
)


def config(
    context: typer.Context,
    action: Annotated[Action, ACTION] = "list",
    key: Annotated[str | None, KEY] = None,
    value: Annotated[str | None, typer.Argument(metavar="VALUE", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="With list: all that can be set, with its default.")] = False,
    project: Annotated[
        bool, typer.Option("--project", help="With set, unset, path: the project's .dsv2.toml.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    from dsv2cli import settings

    root: Any = context.find_root().command
    wanted = {"get": 1, "set": 2, "unset": 1}.get(action, 0)
    given = [word for word in (key, value) if word is not None]
    if len(given) != wanted:
        words = {0: "nothing more", 1: "a KEY", 2: "a KEY and a VALUE"}[wanted]
        raise UsageError(f"config {action} takes {words}", "dsv2 config --help")
    for option, is_given, actions in (
        ("--all", every, ("list",)),
        ("--project", project, ("set", "unset", "path")),
        ("--json", as_json, ("list", "get")),
    ):
        if is_given and action not in actions:
            raise UsageError(f"{option} is of config {', '.join(actions)}, not of {action}", "dsv2 config --help")
    if action == "path":
        console.say_path(file_of(project=project))
    elif action == "list":
        show(root, every=every, as_json=as_json)
    elif action == "get":
        settings.check_key(root, str(key))
        found = settings.effective(root, str(key), settings.values(root))
        if found.origin == settings.NOWHERE:
            raise UsageError(f"`{key}` is not set", "dsv2 config lists what is")
        if as_json:
            console.print_json(record(found))
        else:
            console.say(text_of(found.value))
            console.note(f"({found.origin})", "dim")
    else:
        change(root, str(key), value, project=project)


def file_of(*, project: bool) -> Path:
    from dsv2cli import settings

    if project:
        return settings.project_file() or Path.cwd() / settings.PROJECT_FILE
    path = settings.user_file()
    if path is None:
        raise UsageError("there is no home folder to keep settings in", "set HOME or XDG_CONFIG_HOME")
    return path


def change(root: Any, key: str, value: str | None, *, project: bool) -> None:
    from dsv2cli import settings

    settings.check_key(root, key)
    if project and settings.SETTINGS[key.rpartition(".")[2]].is_ours:
        raise UsageError(f"`{key}` is not for a project to set", "leave out --project to set it for yourself")
    path = file_of(project=project)
    made = None if value is None else settings.typed(root, key, value)
    settings.write(path, {key: made})
    console.note(f"{key} is {text_of(made)} in {path}" if made is not None else f"{key} is not set in {path}")
    stronger = settings.effective(root, key, settings.values(root))
    if stronger.origin not in ("default", settings.NOWHERE, str(path)):
        console.warn(f"{stronger.origin} sets it to {text_of(stronger.value)}, and comes first")


def show(root: Any, *, every: bool, as_json: bool) -> None:
    from dsv2cli import settings

    found = settings.values(root)
    keys = list(dict.fromkeys([*(settings.keys_of(root) if every else ()), *(v.key for v in found)]))
    rows = [settings.effective(root, key, found) for key in keys]
    if as_json:
        console.print_json([record(row) for row in rows])
        return
    if not rows:
        console.note("nothing is set: dsv2 config --all lists what can be", "dim")
        return
    table = console.Table("", ("key", "value", "from"))
    for row in rows:
        table.add(row.key, text_of(row.value), row.origin)
    console.show(table)


def record(row: Any) -> dict[str, object]:
    return {"key": row.key, "value": row.value, "origin": row.origin}


def text_of(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
