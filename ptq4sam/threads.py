"""OpenMP's threads, told to sleep soon when they have nothing to do."""

from __future__ import annotations

import logging
import os
import sys

_log = logging.getLogger(__name__)

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300", "KMP_BLOCKTIME": "0"}
"""What OpenMP's libraries read when they are loaded: all of them, GNU's, that of LLVM and Intel.

GNU's counts how often a thread looks for work before it sleeps: 300 times take some microseconds,
about what it takes to wake it up.
"""
SETTINGS = {*WAITING, "KMP_LIBRARY"}
"""Variables that say how threads wait; a user who sets one of them has decided."""


def wait_asleep() -> bool:
    """Let idle threads of OpenMP sleep soon; `import ptq4sam` calls it.

    By default they spin for milliseconds, because to wake one up takes some microseconds. Where
    another program needs the core they take it from that program, and threads that have work to do
    wait for those that have none. Settings of the user's environment are left as they are.

    It has to be called before torch is loaded; later it serves only the processes that this one
    starts.

    Returns:
        Whether the environment was changed.
    """
    if not SETTINGS.isdisjoint(os.environ):
        return False
    if "torch" in sys.modules:
        _log.debug("torch was imported before ptq4sam: its threads spin while they wait")
    os.environ.update(WAITING)
    return True
