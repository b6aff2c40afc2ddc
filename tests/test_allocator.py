"""The allocator keeps freed memory, unless the user has said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, sys
from ptq4sam.allocator import keep_freed_memory, release_freed_memory
changed = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1])
before = resident()
block = libc.malloc(2**26)
ctypes.memset(block, 1, 2**26)
libc.free(block)
kept = resident() - before
release_freed_memory()
print(int(changed), kept * 4096 >= 2**25, (resident() - before) * 4096 >= 2**25)
"""


def run(**environment: str) -> list[str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(
        command, env={**base, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    assert run() == ["1", "True", "False"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_settings_of_the_environment_stay() -> None:
    assert run(MALLOC_MMAP_THRESHOLD_="65536") == ["0", "False", "False"]
