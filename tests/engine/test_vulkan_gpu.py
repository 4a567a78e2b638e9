"""A device opened, its memory and one shader: on whatever Vulkan finds here, a software device too."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from support.gpu import Gpu, number, reason

import cext
from cext import _engine


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu(number())


@pytest.mark.parametrize("n", [1, 127, 128, 100_000])
def test_a_shader_writes_what_it_is_told(gpu: Gpu, n: int) -> None:
    y = np.full(n + 8, 7, np.float32)
    gpu.run("fill", [y], struct.pack("<QfI", 0, 2.5, n), [(-1, 0, 0, 16)], ((n + 127) // 128, 1, 1))
    assert (y[4 : 4 + n] == 2.5).all() and (y[:4] == 7).all() and (y[4 + n :] == 7).all()


def test_large_arrays_go_there_and_back_whole(gpu: Gpu) -> None:
    y = np.arange(20_000_000, dtype=np.float32)  # more than one piece of what copies go through
    gpu.run("fill", [y], struct.pack("<QfI", 0, -1.0, 3), [(-1, 0, 0, 4)], (1, 1, 1))
    expected = np.arange(20_000_000, dtype=np.float32)
    expected[1:4] = -1
    assert np.array_equal(y, expected)


def test_what_cannot_be_written_stays(gpu: Gpu) -> None:
    y = np.zeros(4, np.float32)
    y.flags.writeable = False
    gpu.run("fill", [y], struct.pack("<QfI", 0, 1.0, 4), [(-1, 0, 0, 0)], (1, 1, 1))
    assert not y.any()


def test_an_address_is_put_into_an_array(gpu: Gpu) -> None:
    y, table = np.zeros(4, np.float32), np.zeros(2, np.uint64)
    gpu.run("fill", [y, table], struct.pack("<QfI", 0, 1.0, 4), [(-1, 0, 0, 0), (1, 8, 0, 0)], (1, 1, 1))
    assert table[0] == 0 and table[1] != 0 and table[1] % 4 == 0


@pytest.mark.parametrize(
    "link", [(-1, 9, 0, 0), (0, 9, 0, 0), (-2, 0, 0, 0), (1, 0, 0, 0), (-1, 0, 1, 0), (-1, 0, 0, 17)]
)
def test_links_outside_are_refused(gpu: Gpu, link: tuple[int, int, int, int]) -> None:
    with pytest.raises(cext.ArgumentError, match="link"):
        gpu.run("fill", [np.zeros(4, np.float32)], struct.pack("<QfI", 0, 1.0, 0), [link], (1, 1, 1))


def test_a_shader_that_is_not_there_is_named(gpu: Gpu) -> None:
    with pytest.raises(cext.ArgumentError, match="`nonsense`"):
        gpu.run("nonsense", [], b"", [], (1, 1, 1))


def test_a_device_is_found_by_number_and_by_letters(gpu: Gpu) -> None:
    device = _engine.gpu_list()[int(number())]
    name = device["name"]
    for which in (number(), name, name.upper()[:5]):
        _engine.gpu_close(_engine.gpu_open(which))
    assert device["memory"] >= device["free"] > 0 and device["subgroup"] > 0 and device["api"].startswith("1.")


@pytest.mark.parametrize("which", ["no such card", "99", "12345678901234567890"])
def test_a_device_that_is_not_there_is_named(which: str) -> None:
    if why := reason():
        pytest.skip(why)
    with pytest.raises(cext.DeviceError, match=f"`{which}`") as caught:
        _engine.gpu_open(which)
    assert "0: " in caught.value.hint


def test_software_is_not_taken_unless_it_is_named() -> None:
    if why := reason():
        pytest.skip(why)
    if any(device["kind"] != "software" and not device["missing"] for device in _engine.gpu_list()):
        pytest.skip("there is a GPU here")
    with pytest.raises(cext.DeviceError, match="no GPU here can be used"):
        _engine.gpu_open(None)


def test_devices_are_there_however_often_they_are_asked_for() -> None:
    """A driver that is loaded anew each time fails after some: NVIDIA's after a few."""
    which = number()
    for _ in range(40):
        assert _engine.gpu_list()
    for _ in range(4):
        _engine.gpu_close(_engine.gpu_open(which))


FORKED = """
import os, sys, cext
from cext import _engine
_engine.gpu_list()
if not (child := os.fork()):
    try:
        _engine.gpu_list()
    except cext.DeviceError as error:
        os._exit(0 if "forked" in str(error) and error.hint else 3)
    os._exit(4)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused() -> None:
    """A driver that the parent has set up is not the child's to use."""
    number()
    assert subprocess.run([sys.executable, "-P", "-c", FORKED], timeout=300, check=False).returncode == 0


def test_a_closed_device_says_so() -> None:
    handle = _engine.gpu_open(number())
    _engine.gpu_close(handle)
    with pytest.raises(cext.ArgumentError, match="the gpu is closed"):
        _engine.gpu_run(handle, "fill", [], b"", [], (1, 1, 1), [])


def test_without_a_device_one_line_says_why() -> None:
    """Where nothing can be tested, the reason is a sentence."""
    why = reason()
    if why is None:
        pytest.skip("there is a device here")
    with pytest.raises(cext.DeviceError) as caught:
        _engine.gpu_open("0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 10
