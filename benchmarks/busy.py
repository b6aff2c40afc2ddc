"""Seconds of a quantization on a quiet machine and beside another program, by how threads wait.

    python benchmarks/busy.py [--rounds 1] [--pin] [-- COMMAND ...]

The command is by default `ptq4sam quantize` by exp/ptq4sam-s44.yaml on two generated scenes. It
runs on two cores: alone, and while another program computes without end on one of them. Threads
that wait sleep, as `import ptq4sam` sets it, or spin for some milliseconds first, as OpenMP's
library has it by itself. A first run, which compiles kernels, does not count. Medians of the
rounds, each of which goes through all cases. Other programs slow all of it down: stop them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ptq4sam.threads import SETTINGS

_ROOT = Path(__file__).resolve().parents[1]
_SPINNING = "300000"
"""Times that GNU's library looks for work before a thread sleeps, if it is not told otherwise."""
POLICIES = {"asleep": {}, "spinning": {"GOMP_SPINCOUNT": _SPINNING, "KMP_BLOCKTIME": "200"}}


def quantization(folder: Path) -> list[str]:
    """The command that is measured by default; its scenes are written to the folder."""
    ptq4sam = [sys.executable, "-m", "ptq4sam"]
    subprocess.run(
        [*ptq4sam, "scenes", folder / "scenes", "--train", "2", "--val", "1"],
        check=True,
        capture_output=True,
    )
    flags = {
        "--scheme": _ROOT / "exp" / "ptq4sam-s44.yaml",
        "--calibration-size": 2,
        "--calibration-images": folder / "scenes" / "images" / "train",
        "--calibration-annotations": folder / "scenes" / "annotations" / "train.json",
        "--output": folder / "model.safetensors",
        "--work-dir": folder / "work",
    }
    return [*ptq4sam, "quantize", *(str(part) for flag in flags.items() for part in flag)]


@contextlib.contextmanager
def other_program(core: int | None) -> Iterator[None]:
    """A program that computes for as long as the `with` block lasts, on a core if one is given."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            if core is not None:
                os.sched_setaffinity(program.pid, {core})
            yield
        finally:
            program.kill()


def seconds(command: Sequence[str], settings: Mapping[str, str]) -> float:
    """How long a command takes with these settings of OpenMP.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    started = time.monotonic()
    subprocess.run(command, env={**environment, **settings}, check=True, capture_output=True)
    return time.monotonic() - started


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pin", action="store_true", help="the other program may not change cores")
    parser.add_argument("command", nargs="*", help="what is measured")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    took: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = arguments.command or quantization(Path(folder))
        seconds(command, POLICIES["asleep"])
        for _ in range(arguments.rounds):
            for name, settings in POLICIES.items():
                took.setdefault((name, False), []).append(seconds(command, settings))
                with other_program(cores[0] if arguments.pin else None):
                    took.setdefault((name, True), []).append(seconds(command, settings))
    median = {case: statistics.median(times) for case, times in took.items()}
    write(f"{len(cores)} cores, medians of {arguments.rounds}\n")
    write("| idle threads | quiet s | busy s | busy / quiet | quiet / quiet spinning |\n")
    write("|---" * 5 + "|\n")
    for name in POLICIES:
        quiet, busy = median[name, False], median[name, True]
        write(f"| {name} | {quiet:.1f} | {busy:.1f} | {busy / quiet:.2f} ")
        write(f"| {quiet / median['spinning', False]:.2f} |\n")


if __name__ == "__main__":
    main()
