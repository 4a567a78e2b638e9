"""settings.py: what options are set to where no command line says it, and where that comes from.

The weakest first: the option's own default, the user's file, the project's file, the environment, the command line. In
a file a name stands for every command that has the option, under a command's table for that one:

    kv = "q8_0"

    [chat]
    temp = 0.5

and in the environment DSV2_KV and DSV2_CHAT_TEMP. A project's file may be somebody else's: it sets nothing that opens a
connection.

A preset is a set of chat's settings under a name. `dsv2 chat --preset coder` takes them together, before what files and
the environment set for chat; a project's keys come before the user's of the same preset:

    [presets.coder]
    system = "You write Python."
    temp = 0.2
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2cli.errors import CliError, UsageError

PROJECT_FILE = ".dsv2.toml"
CLOSE = 0.5  # of two keys: `kb` is as close to `kv`
LIST_HINT = "dsv2 config --all lists what can be set"
NOWHERE = "not set"  # the origin of a preset's key that has none
PRESETS = "presets"
PRESET_KEY = re.compile(rf"{PRESETS}\.(\w[\w-]{{0,49}})\.([a-z-]+)")
IN_PRESETS = ("system", "think", "temp", "top-k", "top-p", "min-p", "repeat-penalty", "seed", "max-tokens")
PRESETS_HINT = "dsv2 config set presets.NAME.temp 0.2 makes one"


@dataclass(frozen=True)
class Setting:
    """An option that may be set. is_ours: by the user alone, not by a project. unless: words of a command line beside
    which it has no place, and is left out."""

    name: str
    is_ours: bool = False
    unless: tuple[str, ...] = ()


SETTINGS = {
    s.name: s
    for s in (
        Setting("threads"),
        Setting("ctx"),
        Setting("kv"),
        Setting("engine", unless=("--rpc", "--gpu-layers", "--gpu")),
        Setting("ram", unless=("--rpc", "--gpu-layers", "--engine")),
        Setting("gpu-layers", unless=("--engine", "--ram", "--gpu")),
        Setting("rpc", is_ours=True, unless=("--engine", "--ram", "--gpu")),
        Setting("gpu"),
        Setting("vram"),
        Setting("temp"),
        Setting("top-k"),
        Setting("top-p"),
        Setting("min-p"),
        Setting("repeat-penalty"),
        Setting("max-tokens"),
        Setting("seed"),
        Setting("lookup"),
        Setting("system", unless=("--raw", "--fim")),
        Setting("think", unless=("--raw", "--fim")),
        Setting("preset", unless=("--raw", "--fim")),
        Setting("host", is_ours=True),
        Setting("port", is_ours=True),
        Setting("parallel"),
        Setting("queue"),
        Setting("cache"),
        Setting("deterministic"),
        Setting("rounds"),
    )
}
"""The one table of what can be set. Which commands have it, and what it may be, their options say."""


@dataclass(frozen=True)
class Value:
    """What a key is set to, and where."""

    key: str  # "kv", "chat.temp"
    value: Any
    origin: str

    @property
    def verb(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


def user_file() -> Path | None:
    """Where the user's settings are; None where there is no home."""
    folder = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(folder) if folder else Path.home() / ".config") / "dsv2" / "config.toml"
    except RuntimeError:
        return None


def project_file() -> Path | None:
    """The nearest one, from the working folder up to the repository's or the home's own; None where there is none, or
    where it is another user's."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    home = os.environ.get("HOME", "")
    try:
        for folder in (here, *here.parents):
            path = folder / PROJECT_FILE
            if path.is_file():
                return path if path.stat().st_uid in (os.getuid(), 0) else None
            if (folder / ".git").exists() or str(folder) == home:
                return None
    except OSError:  # a folder above that this user may not enter
        return None
    return None


def options_of(root: Any) -> dict[str, dict[str, Any]]:
    """By verb, by setting's name: the option."""
    found: dict[str, dict[str, Any]] = {}
    for verb, command in root.commands.items():
        for option in command.params:
            names = {word.removeprefix("--") for word in option.opts if word.startswith("--")}
            for name in names & SETTINGS.keys():
                found.setdefault(verb, {})[name] = option
    return found


def keys_of(root: Any) -> list[str]:
    """Every key that there is: names for all commands, then those of one."""
    options = options_of(root)
    general = [name for name in SETTINGS if any(name in mine for mine in options.values())]
    return general + [f"{verb}.{name}" for verb, mine in options.items() for name in SETTINGS if name in mine]


def check_key(root: Any, key: str, where: str = "") -> None:
    """UsageError for a key that there is not, with the one that was likely meant."""
    if key == PRESETS or key.startswith(f"{PRESETS}."):
        found = PRESET_KEY.fullmatch(key)
        if found is None or found[2] not in IN_PRESETS:
            raise UsageError(f"{where}`{key}` is nothing of a preset", f"{PRESETS}.NAME. and {', '.join(IN_PRESETS)}")
        return
    keys = keys_of(root)
    if key in keys:
        return
    name = key.rpartition(".")[2].replace("_", "-")
    near = [k for k in keys if k == name or k.endswith(f".{name}")][:1]  # of another command, or of all
    near = near or difflib.get_close_matches(key.replace("_", "-"), keys, 1, CLOSE)
    raise UsageError(f"{where}`{key}` is nothing that can be set", f"did you mean {near[0]}?" if near else LIST_HINT)


def converted(root: Any, key: str, value: Any, where: str = "") -> Any:
    """The value as its option takes it. UsageError where it does not."""
    import typer

    named, option = _option(root, key)
    name = key.rpartition(".")[2]
    is_flag = isinstance(value, bool)
    if is_flag != bool(getattr(option, "is_flag", False)) and not isinstance(value, str):
        raise UsageError(f"{where}`{key}` is {_shown(value)}, which --{name} does not take", f"dsv2 {named} --help")
    if isinstance(value, list | dict):
        raise UsageError(f"{where}`{key}` is a {type(value).__name__}, expected one value", f"dsv2 {named} --help")
    command = root.commands[named]
    context = command.context_class(command, info_name=named)
    try:
        return option.process_value(context, value if is_flag else str(value))
    except typer.BadParameter as error:
        from dsv2cli.app import refused

        told = refused(error).rstrip(".")
        raise UsageError(f"{where}`{key}`: {told}", f"dsv2 {named} --help lists what --{name} takes") from error


def _option(root: Any, key: str) -> tuple[str, Any]:
    """(a command, its option) that a key is of."""
    verb, _, name = key.rpartition(".")
    options = options_of(root)
    if verb.startswith(f"{PRESETS}."):
        verb = "chat"
    named = verb or next(v for v, mine in options.items() if name in mine)
    return named, options[named][name]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def values(root: Any) -> list[Value]:
    """All that is set, the strongest last. UsageError, CliError for a file that cannot be read or holds what it may
    not."""
    found: list[Value] = []
    for path, is_project in ((user_file(), False), (project_file(), True)):
        if path is not None:
            found += _of_file(root, path, is_project=is_project)
    return found + list(_of_environment(root))


def _of_file(root: Any, path: Path, *, is_project: bool) -> list[Value]:
    flat: dict[str, Any] = {}
    tables = read(path)
    presets = tables.pop(PRESETS, {})
    for key, value in [*tables.items(), *_prefixed(PRESETS, presets).items()]:
        flat |= _prefixed(key, value)
    found = []
    for key, value in flat.items():
        check_key(root, key, f"`{path}`: ")
        if is_project and SETTINGS[key.rpartition(".")[2]].is_ours:
            raise UsageError(
                f"`{path}`: `{key}` is not for a project to set", f"dsv2 config set {key} VALUE sets it for yourself"
            )
        found.append(Value(key, converted(root, key, value, f"`{path}`: "), str(path)))
    return sorted(found, key=lambda v: v.verb != "")


def _prefixed(key: str, value: Any) -> dict[str, Any]:
    """What a key holds: a table's keys with its own before them, or itself."""
    return {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}


def read(path: Path) -> dict[str, Any]:
    """A file's tables; none where there is no file. CliError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        return {}
    except OSError as error:
        raise CliError(f"`{path}`: {error.strerror}", "dsv2 config path tells where settings are") from error
    except ValueError as error:  # of TOML, and of UTF-8
        raise CliError(f"`{path}` is no TOML: {error}", "correct that line, or remove the file") from error


def variable(key: str) -> str:
    """The environment's name of a key: chat.top-k is DSV2_CHAT_TOP_K."""
    return "DSV2_" + key.upper().replace(".", "_").replace("-", "_")


def _of_environment(root: Any) -> Iterator[Value]:
    for key in keys_of(root):
        name = variable(key)
        if (value := os.environ.get(name)) is not None and value != "":
            yield Value(key, converted(root, key, _flag(root, key, value), f"{name}: "), name)


def _flag(root: Any, key: str, text: str) -> Any:
    """Words that say yes or no, where the option is a flag; the text elsewhere."""
    _, option = _option(root, key)
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    return words.get(text.lower(), text) if getattr(option, "is_flag", False) else text


def defaults(root: Any, args: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a command line's command takes where the line does not say: by verb, by its parameter's name."""
    verb = next((word for word in args if word in root.commands), None)
    mine = options_of(root).get(verb or "", {})
    if not mine:
        return {}
    made: dict[str, Any] = {}
    given = {word.partition("=")[0] for word in args}
    for value in values(root):
        setting = SETTINGS[value.name]
        if value.verb in ("", verb) and value.name in mine and not given & set(setting.unless):
            made[mine[value.name].name] = value.value
    return {verb: made} if verb else {}


def effective(root: Any, key: str, found: Sequence[Value]) -> Value:
    """What a key comes to: the strongest of its own and of its name for all commands, or the option's default; a
    preset's is what is set, or nothing."""
    verb, _, name = key.rpartition(".")
    is_preset = verb.startswith(f"{PRESETS}.")
    mine = [v for v in found if v.name == name and (v.verb == verb or not (v.verb or is_preset))]
    if mine:
        return Value(key, mine[-1].value, mine[-1].origin)
    if is_preset:
        return Value(key, None, NOWHERE)
    return Value(key, _option(root, key)[1].default, "default")


# Presets.


def presets(root: Any) -> dict[str, dict[str, Value]]:
    """By name: what each sets, by option. UsageError, CliError."""
    found: dict[str, dict[str, Value]] = {}
    for value in values(root):
        if key := PRESET_KEY.fullmatch(value.key):
            found.setdefault(key[1], {})[key[2]] = value
    return found


def preset(root: Any, name: str) -> dict[str, Value]:
    """What the preset ``name`` sets. UsageError where there is none."""
    found = presets(root)
    if name not in found:
        raise UsageError(
            f"there is no preset `{name}`", f"there are: {', '.join(sorted(found))}" if found else PRESETS_HINT
        )
    return found[name]


def preset_names() -> list[str]:
    """Of the files' tables, whatever else they hold; for completion."""
    found: dict[str, None] = {}
    for path in (user_file(), project_file()):
        try:
            named = read(path).get(PRESETS) if path is not None else None
        except CliError:
            continue
        found |= dict.fromkeys(named if isinstance(named, dict) else ())
    return sorted(found)


# Writing.


def typed(root: Any, key: str, text: str) -> Any:
    """What a person typed, as TOML is to hold it: a number, true or false, a text. UsageError where it does not fit."""
    check_key(root, key)
    made = converted(root, key, _flag(root, key, text))
    return made if isinstance(made, bool | int | float | str) else text


def _table(path: Path, document: Any, name: str, *, make: bool) -> Any:
    """The table of a document that is called ``name``, as presets.coder is; one of nothing where it is missing and not
    to be made. CliError."""
    import tomlkit

    table, parts = document, name.split(".") if name else []
    for i, part in enumerate(parts):
        if part not in table:
            if not make:
                return {}
            table[part] = tomlkit.table(is_super_table=i + 1 < len(parts))
        table = table[part]
        if not isinstance(table, dict):
            raise CliError(f"`{path}`: `{part}` is {_shown(table)}, expected a table", f"`[{name}]` begins one")
    return table


def write(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a file, or take out those that are None; all else in it stays as it is, comments too. CliError."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    from cext import system

    read(path)  # the same words for what is wrong with it
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        document: Any = tomlkit.parse(before)
        for key, value in changes.items():
            verb, _, name = key.rpartition(".")
            table: Any = _table(path, document, verb, make=value is not None)
            if value is None:
                table.pop(name, None)
            else:
                table[name] = value
        place = path.resolve()  # a link stays one
        place.parent.mkdir(parents=True, exist_ok=True)
        with system.replaced(place, mode=0o666) as file:
            file.write(tomlkit.dumps(document).encode())
    except TOMLKitError as error:
        raise CliError(f"`{path}` is no TOML: {error}", "correct that line, or remove the file") from error
    except OSError as error:
        raise CliError(f"`{path}`: {error.strerror}", "XDG_CONFIG_HOME puts settings elsewhere") from error
