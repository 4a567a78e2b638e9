"""Our own declarations of Vulkan against Khronos's, where its header is: every member's place and every number."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HEADER = Path(__file__).resolve().parents[2] / "cext" / "backend" / "vulkan" / "api.h"
NEWER = re.compile(r"Cooperative|COOPERATIVE|COMPONENT_TYPE|SCOPE_")
"""What Khronos's header has from 1.3.255 on, with VK_KHR_cooperative_matrix."""
PREFIXES = {"VKR": "VK", "VKS": "VK_STRUCTURE_TYPE", "VKB": "VK"}


def members(text: str) -> Iterator[tuple[str, str]]:
    """(structure, member) of every member that is not passed over."""
    for name, body in re.findall(r"typedef struct vk_([A-Z]\w*) \{(.*?)\} vk_\1;", text, re.DOTALL):
        for declaration in filter(str.strip, body.split(";")):
            for part in declaration.split(","):
                member = re.sub(r"\[\d+\]", "", part).split()[-1].lstrip("*")
                if not member.startswith("pass"):
                    yield name, member


def numbers(text: str) -> Iterator[tuple[str, str]]:
    """(our name, Khronos's name) of every enumerator."""
    for prefix, rest in re.findall(r"^    (VK[RSB])_(\w+) = ", text, re.M):
        yield f"{prefix}_{rest}", f"{PREFIXES[prefix]}_{rest}"


@pytest.fixture
def header() -> str:
    if not HEADER.is_file():
        pytest.skip("no source of the engine here")
    return HEADER.read_text(encoding="utf-8")


def test_declarations_are_khronoss(header: str, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler here")
    probe = tmp_path / "probe.c"
    probe.write_text("#include <vulkan/vulkan_core.h>\n#ifndef VK_API_VERSION_1_3\n#error old\n#endif\n")
    if subprocess.run([compiler, "-fsyntax-only", str(probe)], capture_output=True, check=False).returncode:
        pytest.skip("no Vulkan header of 1.3 or newer here (libvulkan-dev on Debian and Ubuntu)")
    structures = sorted({name for name, _ in members(header)})
    functions = re.findall(r"\bF\(([A-Z]\w+), ", header)
    assert len(structures) > 40 and len(functions) > 40
    begin = ["#include <stddef.h>", "#include <vulkan/vulkan_core.h>", f'#include "{HEADER}"']
    lines = [f'_Static_assert(sizeof(vk_{s}) == sizeof(Vk{s}), "{s}");' for s in structures]
    lines += [
        f"_Static_assert(offsetof(vk_{s}, {m}) == offsetof(Vk{s}, {m}) && sizeof(((vk_{s} *)0)->{m}) =="
        f' sizeof(((Vk{s} *)0)->{m}), "{s}.{m}");'
        for s, m in members(header)
    ]
    lines += [
        f'_Static_assert((long long){ours} == (long long){theirs}, "{ours}");' for ours, theirs in numbers(header)
    ]
    lines += [f"PFN_vk{name} ds_{name};" for name in functions]
    older = [line for line in lines if not NEWER.search(line)]
    newer = ["#ifdef VK_KHR_cooperative_matrix", *(line for line in lines if NEWER.search(line)), "#endif"]
    assert len(newer) > 10
    probe.write_text("\n".join([*begin, *older, *newer]) + "\n")
    found = subprocess.run(
        [compiler, "-std=gnu11", "-fsyntax-only", str(probe)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_members_are_seen() -> None:
    text = "typedef struct vk_A {\n    uint32_t sType; const void *pNext;\n    char n[9], pass0[3], **t;\n} vk_A;\n"
    assert list(members(text)) == [("A", "sType"), ("A", "pNext"), ("A", "n"), ("A", "t")]
