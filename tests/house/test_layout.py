"""The house plan, enforced: which room may import which, and what the library never does.

Python rooms import one way, dsv2cli -> quantize -> cext, and so do the floors of quantize: the run on top -> measure ->
encode -> source -> write -> base. The engine's rooms include one way, the Python binding -> dsv2.h -> model -> backend
-> memory -> arch -> {kernels, quant, gguf} -> base; quant, being facts alone, also lies under gguf and kernels.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "cext"

PYTHON_ROOMS = {"cext": {"cext"}, "quantize": {"quantize", "cext"}, "dsv2cli": {"dsv2cli", "quantize", "cext"}}

TEST_ROOMS = {
    "engine": {"cext"},
    "quantiser": {"cext", "quantize"},
    "program": PYTHON_ROOMS.keys(),
    "house": set[str](),
    "bench": PYTHON_ROOMS.keys(),
    "demo_model": PYTHON_ROOMS.keys(),
    "ref": set[str](),
    "support": PYTHON_ROOMS.keys(),
    "golden": {"cext", "quantize"},
    "fuzz": {"cext"},
    "isa": set[str](),
    "stress": set[str](),
}
"""What a room of tests/ may import of the packages: a package is tested without those above it."""
HELPERS = {"ref": {"ref"}, "house": set[str](), "demo_model": set[str](), "support": {"support", "ref"}}
"""What it may import of the tests' own; the others, support and ref alike."""

FLOORS = {
    "base": set[str](),
    "write": {"base"},
    "source": {"write", "base"},
    "encode": {"source", "base"},
    "measure": {"encode", "source", "base"},
}
"""What a floor of quantize/ may import beside itself; the run that ties them, on top, takes them all."""

BELOW = {
    "base": set[str](),
    "quant": {"base"},
    "gguf": {"quant", "base"},
    "kernels": {"quant", "base"},
    "encode": {"kernels", "quant", "base"},
    "arch": {"quant", "gguf", "base"},
    "memory": {"arch", "kernels", "quant", "gguf", "base"},
    "backend": {"memory", "arch", "kernels", "quant", "gguf", "base"},
    "model": {"backend", "memory", "arch", "quant", "gguf", "base"},
}
"""What a room of the engine may include beside itself."""

TEST = re.compile(r"test_")  # what a file of tests is called

MADE = {"kernels/isas.h"}  # by CMakeLists.txt, in the build folder
MAX_LINES = 1000

SYSTEM = re.compile(r"(?:pthread|unistd|fcntl|sched|signal|threads|windows|dlfcn)\.h|(?:sys|linux|mach)/.*")
INTRINSICS = re.compile(r"\w*intrin\.h|arm_\w+\.h")
ENDS_OR_PRINTS = re.compile(r"\b(?:_?exit|_Exit|quick_exit|abort|assert|v?f?printf|puts|fputs|putchar|perror)\s*\(")
ALLOCATES_OR_THREADS = re.compile(
    r"\b(?:malloc|calloc|realloc|aligned_alloc|free|pthread_\w+|ds_pool_\w+|ds_barrier)\s*\("
)
ISA_NAMES = re.compile(r"avx|sse\d|neon|i8mm|dotprod(?!uct)|_mm\d*_", re.IGNORECASE)


def c_files(*rooms: str) -> list[Path]:
    folders = [ENGINE / room for room in rooms] if rooms else [ENGINE]
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in {".c", ".h", ".def"})


def library_files() -> list[Path]:
    """The engine's files but for the Python binding."""
    return [p for p in c_files() if room_of(p) != "module"]


def python_files(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*") if p.suffix in {".py", ".pyi"})


def room_of(path: Path) -> str:
    """The room of a C file: its folder, dsv2.h (the public interface), or module (the Python binding)."""
    parts = path.relative_to(ENGINE).parts
    if len(parts) == 1:
        return parts[0] if parts[0] == "dsv2.h" else "module"
    return parts[0] if parts[0] in BELOW else "module"


NOT_CODE = re.compile(
    r"""(?P<include>^[ \t]*\#[ \t]*include[^\n]*)
    | /\*.*?\*/ | //[^\n]*
    | (?P<quote>["'])(?:\\.|(?!(?P=quote))[^\\\n])*(?P=quote)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def strip_c(text: str) -> str:
    """C source without comments and with empty strings; includes keep their names, lines their numbers."""
    return NOT_CODE.sub(
        lambda m: m["include"] or (m["quote"] * 2 if m["quote"] else "\n" * m[0].count("\n") or " "), text
    )


def includes(text: str) -> Iterator[tuple[str, bool]]:
    """(name, quoted) of every #include."""
    for m in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', strip_c(text), re.M):
        yield m[2], m[1] == '"'


def folders_of(folder: Path) -> set[str]:
    """The names of the folders in it that hold files, but for what programs leave there."""
    return {
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith((".", "_")) and any(p.is_file() for p in path.iterdir())
    }


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Top-level names of the modules that a file imports; package is its own, for relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").split(".")[0]


def modules(tree: ast.AST) -> Iterator[str]:
    """Full names of what a file imports, "from a import b" as "a.b"; relative imports are not the house's way."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offences(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(strip_c(path.read_text(encoding="utf-8")).splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("room", PYTHON_ROOMS)
def test_python_imports_run_one_way(room: str) -> None:
    files = python_files(room)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), room)
        if name in (PYTHON_ROOMS.keys() | {"tests", "conftest", *TEST_ROOMS}) - PYTHON_ROOMS[room] or TEST.match(name)
    ]
    assert not wrong


@pytest.mark.parametrize("room", TEST_ROOMS)
def test_tests_import_what_they_test_and_never_each_other(room: str) -> None:
    """Under pytest any test file can be imported by its name; what two share is in support."""
    allowed = TEST_ROOMS[room] | HELPERS.get(room, {"support", "ref"})
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(f"tests/{room}")
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), room)
        if name in (PYTHON_ROOMS.keys() | {"tests", "conftest", *TEST_ROOMS}) - allowed or TEST.match(name)
    ]
    assert not wrong


def test_tests_are_in_rooms() -> None:
    """With names of their own: two files of one name are one module to Python."""
    assert folders_of(ROOT / "tests") == TEST_ROOMS.keys()
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]
    files = [path for path in (ROOT / "tests").rglob("*.py") if TEST.match(path.name)]
    assert len({path.name for path in files}) == len(files)
    assert {path.parent.name for path in files} == {"engine", "quantiser", "program", "house"}


def test_python_that_tests_start_finds_what_is_installed() -> None:
    """Without -P the folder it stands in comes first, which from a clone is the source without an engine."""
    files = [path for path in python_files("tests") if path.name != "test_import.py"]
    command = re.compile(r"""sys\.executable,\s*["']-c""")
    assert not [str(path) for path in files if command.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("floor", FLOORS)
def test_floors_import_one_way(floor: str) -> None:
    files = python_files(f"quantize/{floor}")
    assert files
    below = {f"quantize.{name}" for name in FLOORS[floor] | {floor}}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "quantize" and ".".join(name.split(".")[:2]) not in below
    ]
    assert not wrong


def test_the_scheduler_knows_the_engine_alone() -> None:
    """Chats, servers and batches are built on it; it knows of none of them."""
    files = python_files("dsv2cli/scheduler")
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in PYTHON_ROOMS and not name.startswith(("cext.", "dsv2cli.scheduler."))
    ]
    assert not wrong


def test_batches_know_requests_and_no_model() -> None:
    """What answers them is a protocol; of the server they know the forms of bodies and errors alone."""
    files = python_files("dsv2cli/batch")
    assert files
    known = ("cext.system", "dsv2cli.errors.", "dsv2cli.batch.", "dsv2cli.server.errors.", "dsv2cli.server.wire.")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in PYTHON_ROOMS and not name.startswith(known)
    ]
    assert not wrong


def test_llama_cpp_is_behind_its_engine() -> None:
    """What the program needs of a model is a protocol: llama.cpp is called in one room, and by what measures it."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files("dsv2cli")
        if path.parent.name != "llamacpp" and path.name != "contender.py"
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), "dsv2cli")
        if name == "llama_cpp"
    ]
    assert not wrong


def test_every_floor_and_room_is_listed() -> None:
    assert folders_of(ROOT / "quantize") == FLOORS.keys()
    assert folders_of(ENGINE) == BELOW.keys() | {"python"}


TREE = re.compile(r"^(?:(\w+)/|  (\w+)/) +\S", re.MULTILINE)


def rooms_in(readme: str) -> dict[str, set[str]]:
    """The rooms that the tree in the README has lines for, and within each line the others that it names."""
    rooms: dict[str, set[str]] = {}
    room = ""
    for line in readme.partition("## How the rooms fit")[2].split("```")[1].strip("\n").splitlines():
        found = TREE.match(line)
        assert found, f"not a line of the tree: {line}"
        if found[1]:
            room = found[1]
            rooms[room] = set()
        else:
            rooms[room].add(found[2])
        rooms[room] |= set(re.findall(r"(?<![\w/])(\w+)/(?=[ ,;:.]|$)", line[len(found[0]) - 1 :]))
    return rooms


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every folder of code has its word, and every word its folder (of the room, or of a room in it)."""
    rooms = rooms_in((ROOT / "README.md").read_text(encoding="utf-8"))
    assert rooms.keys() == PYTHON_ROOMS.keys() | {"tests"}
    for room, named in rooms.items():
        there = folders_of(ROOT / room) - {"models"}  # data: the packaged model
        deeper = {inner for outer in there for inner in folders_of(ROOT / room / outer)}
        assert there <= named <= there | deeper, room


@pytest.mark.parametrize("room", BELOW)
def test_c_includes_run_one_way(room: str) -> None:
    files = c_files(room)
    assert files
    wrong = []
    for path in files:
        for name, quoted in includes(path.read_text(encoding="utf-8")):
            if not quoted:
                continue
            target = ENGINE / name
            assert target.is_file() or name in MADE, f"{path.relative_to(ROOT)} includes {name}: name it from cext/"
            # model/*.c is where the public interface is implemented.
            implements = room == "model" and path.suffix == ".c" and name == "dsv2.h"
            if room_of(target) not in BELOW[room] | {room} and not implements:
                wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong


def test_a_device_is_known_to_the_list_of_devices_alone() -> None:
    """The model drives operations (backend.h); threads, kernels and packs are behind them."""
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in library_files()
        for name, quoted in includes(path.read_text(encoding="utf-8"))
        if quoted
        and len(parts := Path(name).parts) == 3
        and parts[0] == "backend"
        and path.relative_to(ENGINE).parts[:2] != parts[:2]
        and path != ENGINE / "backend" / "device.c"
    ]
    assert not wrong


def test_only_the_binding_includes_python() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in library_files()
        for name, quoted in includes(path.read_text(encoding="utf-8"))
        if name == "Python.h" or (quoted and room_of(ENGINE / name) == "module")
    ]
    assert not wrong


def test_intrinsics_stay_in_the_simd_headers() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in c_files()
        for name, _ in includes(path.read_text(encoding="utf-8"))
        if INTRINSICS.fullmatch(name) and not re.fullmatch(r"kernels/simd_\w+\.h", path.relative_to(ENGINE).as_posix())
    ]
    assert not wrong


def test_one_file_a_system_names_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in c_files()
        for name, _ in includes(path.read_text(encoding="utf-8"))
        if SYSTEM.fullmatch(name) and not re.fullmatch(r"base/os(_\w+)?\.[ch]", path.relative_to(ENGINE).as_posix())
    ]
    assert not wrong


def test_the_library_never_exits_or_prints() -> None:
    assert not offences(ENDS_OR_PRINTS, library_files())


def test_only_base_reads_the_environment() -> None:
    above = [path for path in c_files() if room_of(path) != "base"]
    assert not offences(re.compile(r"\bgetenv\b|\benviron\b"), above)


def test_kernels_neither_allocate_nor_thread() -> None:
    assert not offences(ALLOCATES_OR_THREADS, c_files("kernels"))


def test_the_model_names_no_isa() -> None:
    assert not offences(ISA_NAMES, c_files("arch", "model", "memory", "backend"))


@pytest.mark.parametrize("room", ["quantize", "cext"])
def test_libraries_never_print(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files(room)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def writes(tree: ast.AST) -> Iterator[str]:
    """Where a file writes to the screen by itself: print, a standard stream's write, rich."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print"
        if isinstance(node, ast.Attribute) and node.attr in ("write", "writelines", "buffer"):
            stream = ast.unparse(node.value)
            if stream in ("sys.stdout", "sys.stderr"):
                yield f"{node.lineno}: {stream}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
            yield from (f"{node.lineno}: rich's {alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (f"{node.lineno}: rich" for alias in node.names if alias.name.split(".")[0] == "rich")


def test_only_the_console_writes() -> None:
    """Names and texts of files stand in what is said: one place makes them harmless. Drawings hold none."""
    allowed = {"figures.py": {"rich's Text"}, "completing.py": {"sys.stdout.write"}}  # to a shell, names checked there
    wrong = [
        f"{path.relative_to(ROOT)}:{what}"
        for path in python_files("dsv2cli")
        if path.name != "console.py"
        for what in writes(ast.parse(path.read_text(encoding="utf-8")))
        if what.split(": ")[1] not in allowed.get(path.name, set())
    ]
    assert not wrong


def told_of(readme: str) -> tuple[set[str], set[str]]:
    """(files, names of functions and classes) that the README's part on the rooms sets in backticks."""
    part = readme.partition("## How the rooms fit")[2].partition("\n## ")[0]
    spelt = set(re.findall(r"`([\w./]+)`", re.sub(r"```.*?```", "", part, flags=re.DOTALL)))
    files = {name for name in spelt if "/" in name or name.endswith((".py", ".c", ".h"))}
    return files, {name.rpartition(".")[2] for name in spelt - files}


def test_what_the_readme_leads_to_is_there() -> None:
    files, names = told_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(files) > 10 and len(names) > 20
    assert not {name for name in files if not (ROOT / name).exists() and not (ENGINE / name).exists()}
    sources = [path for room in PYTHON_ROOMS for path in (*python_files(room), *c_files())]
    defined = "\n".join(path.read_text(encoding="utf-8") for path in dict.fromkeys(sources))
    assert not {name for name in names if not re.search(rf"\b(?:def|class) {name}\b|^[^#=;]*\b{name}\(", defined, re.M)}


def test_files_stay_readable() -> None:
    files = [*c_files(), *(path for room in (*PYTHON_ROOMS, "tests") for path in python_files(room))]
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}


ONE_SYSTEM_MODULES = {"fcntl", "mmap", "resource", "termios", "tty", "pwd", "grp", "msvcrt", "winreg"}
ONE_SYSTEM_CALLS = re.compile(
    r"posix_f\w+|p(read|write)v?|statvfs|fstatvfs|sched_\w+|cpu_count|fork|fchmod|chroot|mkfifo|getuid|geteuid|getrusage"
    r"|O_(DIRECTORY|CLOEXEC|NOATIME|DIRECT|SYNC|BINARY)"
)


def calls_of_one_system(tree: ast.AST) -> Iterator[str]:
    """Modules and functions that not all operating systems have."""
    yield from (name for name in modules(tree) if name.split(".")[0] in ONE_SYSTEM_MODULES)
    for node in ast.walk(tree):
        of_os = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        if of_os and ONE_SYSTEM_CALLS.fullmatch(node.attr):
            yield f"os.{node.attr}"


@pytest.mark.parametrize("room", ["quantize", "cext"])
def test_one_module_names_the_operating_system(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(room)
        for name in calls_of_one_system(ast.parse(path.read_text(encoding="utf-8")))
        if path != ENGINE / "system.py"
    ]
    assert not wrong


# The tools above see what they are for.


CALLS = [
    "    exit(1);",
    "abort ();",
    'printf("x");',
    'fprintf(f, "x");',
    "if (x) _exit(2);",
    'puts("x");',
    "assert(x);",
]
NO_CALLS = ["/* exit(1) */", "// abort()", '"printf(x)"', "snprintf(a, b, c);", "vsnprintf(a)", "static_assert(x);"]


@pytest.mark.parametrize("source", CALLS)
def test_calls_are_seen(source: str) -> None:
    assert ENDS_OR_PRINTS.search(strip_c(source))


@pytest.mark.parametrize("source", NO_CALLS)
def test_others_are_not(source: str) -> None:
    assert not ENDS_OR_PRINTS.search(strip_c(source))


def test_lines_keep_their_numbers() -> None:
    assert strip_c('/* a\n b */\nx = "/*";\ny = \'"\'; // "\nexit(1);').splitlines()[4] == "exit(1);"


def test_includes_are_seen() -> None:
    text = '#include <immintrin.h>\n # include "quant/quant.h" // why\n/* #include "no.h" */\nx = "#include <no.h>";\n'
    assert list(includes(text)) == [("immintrin.h", False), ("quant/quant.h", True)]
    assert all(INTRINSICS.fullmatch(name) for name in ("immintrin.h", "x86intrin.h", "arm_neon.h", "arm_sve.h"))


def test_writing_is_seen() -> None:
    tree = ast.parse("import rich\nprint(1)\nsys.stderr.write(x)\nfrom rich.table import Table\nsys.stdout.flush()\n")
    found = ["1: rich", "2: print", "3: sys.stderr.write", "4: rich's Table"]
    assert sorted(writes(tree)) == found


def test_imports_are_seen() -> None:
    tree = ast.parse("import os.path\nfrom quantize.recipe import a\ndef f():\n    from . import b\n    import cext\n")
    assert set(imported(tree, "dsv2cli")) == {"os", "quantize", "dsv2cli", "cext"}


def test_a_tree_is_read() -> None:
    tree = "## How the rooms fit\n\n```\na/    one in b/, some\n  c/  two (x.h); d/ and e/\nf/  g.c/h no\n```\n```\n"
    assert rooms_in(tree) == {"a": {"b", "c", "d", "e"}, "f": set()}


def test_modules_are_seen() -> None:
    tree = ast.parse("import os\nfrom quantize.source import arch, tensors\ndef f():\n    from quantize import job\n")
    assert list(modules(tree)) == ["os", "quantize.source.arch", "quantize.source.tensors", "quantize.job"]


def test_calls_of_one_system_are_seen() -> None:
    tree = ast.parse("import os, fcntl\nos.preadv(0, [], 0)\nos.open('x', os.O_RDWR | os.O_DIRECTORY)\nos.fsync(0)")
    assert set(calls_of_one_system(tree)) == {"fcntl", "os.preadv", "os.O_DIRECTORY"}
