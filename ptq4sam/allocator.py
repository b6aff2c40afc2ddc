"""The C library's allocator, told to keep what is freed."""

from __future__ import annotations

import ctypes
import logging
import os
import platform

_log = logging.getLogger(__name__)

# From malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1
_PAD = 2**26


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of giving it back to the system.

    By default the GNU C library maps and unmaps every large tensor: on a CPU an elementwise
    operation then spends most of its time on fresh pages. Settings of the user's environment
    (MALLOC_MMAP_MAX_ and the like) are left as they are.

    Returns:
        Whether the allocator was changed; False where it is another one.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: _PAD}
    refused = [name for name, value in settings.items() if mallopt(name, value) != 1]
    if refused:
        _log.debug("the allocator refused settings %s: runs on a CPU will be slower", refused)
    return not refused


def release_freed_memory() -> None:
    """Give what is freed back to the system, where `keep_freed_memory` made the process keep it.

    Between pictures, not between operations: large tensors of one picture leave gaps in memory that
    those of the next may not fit into, and the process grows.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
