"""While it is open, freed arrays go back to the system; who says what the C library keeps is left to it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's thresholds")

CODE = """
import ctypes, sys
from bitwright.backend import giving_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
MIB = 2**20

def kept():
    "MiB that stay mapped when forty arrays between small ones, as weights among a graph, were freed."
    before = mapped()
    arrays = []
    for _ in range(40):
        arrays.append(libc.malloc(4 * MIB))
        libc.malloc(MIB // 4)  # what stays, 10 MiB
    for array in arrays:
        libc.free(array)
    return mapped() - before

def mapped():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) // 1024

libc.free(libc.malloc(30 * MIB))  # from here on the C library lets smaller ones lie in the heap
libc.free(libc.malloc(30 * MIB))
if sys.argv[1] == "without":
    print(kept())
elif sys.argv[1] == "within":
    with giving_back():
        with giving_back():
            pass
        print(kept())
else:
    with giving_back():
        pass
    print(kept())
"""
THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def kept(when: str, **environment: str) -> int:
    own = {k: v for k, v in os.environ.items() if k not in THRESHOLDS} | environment
    done = subprocess.run([sys.executable, "-c", CODE, when], env=own, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_arrays_go_back_while_it_is_open_and_lie_in_the_heap_again_afterwards() -> None:
    assert kept("without") >= 120, "the heap has holes, or this test shows nothing"
    assert kept("within") <= 16
    assert kept("afterwards") >= 120


@pytest.mark.parametrize(
    "asked",
    [{"MALLOC_MMAP_THRESHOLD_": str(2**25)}, {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**25}"}],
)
def test_who_sets_a_threshold_is_left_to_it(asked: dict[str, str]) -> None:
    assert kept("within", **asked) >= 120
