"""What CPU ranks do with freed memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paraplan.cpu_ranks import _OWN_SETTINGS, keep_freed_memory

FAULTS = """
import ctypes, resource, sys
from paraplan.cpu_ranks import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    keep_freed_memory()
size = 48 * 2**20
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    environment = {name: v for name, v in os.environ.items() if name not in _OWN_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    pages_of_huge_size = 4 * 48 // 2  # the kernel may map 2 MiB at once
    assert faults("return") >= pages_of_huge_size
    assert faults("keep") < pages_of_huge_size // 2


@pytest.mark.parametrize("name", _OWN_SETTINGS)
def test_the_users_own_settings_of_memory_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert keep_freed_memory() is False
