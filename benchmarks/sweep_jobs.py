"""Trials per hour of `ptq4sam sweep` with one worker and with more, and a trial's overhead.

    python benchmarks/sweep_jobs.py [--jobs 2] [--trials 4] [--steps 60]

Trials are seeds of PTQ4SAM-L at 4 bits on vit_nano and generated scenes: with one worker on one
core, with one worker that has all cores, and with so many workers that share them. What trials
share and the kernels of each number of threads are made by a round that is not measured. The time
is from the start of the first trial to the end of the last one; overhead is what a trial took
beside its phases (quantization, audit, evaluation).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from ptq4sam.sweep.store import Store, TrialRecord

_ROOT = Path(__file__).resolve().parents[1]


def sweep(
    folder: Path, seeds: range, jobs: int, cores: set[int], arguments: argparse.Namespace
) -> list[TrialRecord]:
    """The records of a sweep over seeds, run on these cores."""
    file = folder / "seeds.yaml"
    file.write_text(
        f"base:\n  scheme: {_ROOT / 'exp' / 'ptq4sam-l44.yaml'}\n  steps: {arguments.steps}\n"
        f"  scheme.calibrate: {arguments.pictures}\n  limit: {arguments.pictures}\n"
        f"grid:\n  seed: {list(seeds)}\n"
    )
    work = folder / "work"
    command = [sys.executable, "-m", "ptq4sam", "sweep", str(file), "--work-dir", str(work)]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        subprocess.run([*command, "--jobs", str(jobs)], check=True, capture_output=True)
    finally:
        os.sched_setaffinity(0, allowed)
    with Store(work / "sweep.sqlite") as store:
        return [record for record in store.latest().values() if record.seed in seeds]


def seconds(records: list[TrialRecord]) -> float:
    """From the start of the first trial to the end of the last one."""
    starts = [datetime.fromisoformat(record.started).timestamp() for record in records]
    ends = [start + record.seconds for start, record in zip(starts, records, strict=True)]
    return max(ends) - min(starts)


def overhead(records: list[TrialRecord]) -> float:
    """Largest time of a trial beside its phases."""
    return max(
        record.seconds - sum(took["seconds"] for took in record.phases.values())
        for record in records
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--trials", type=int, default=4, help="of a measured round")
    parser.add_argument("--steps", type=int, default=60, help="of reconstruction, a unit")
    parser.add_argument("--pictures", type=int, default=8, help="to calibrate and to evaluate on")
    arguments = parser.parse_args()
    lines = ["| jobs | cores | trials | seconds | trials per hour | overhead s |", "|---" * 6 + "|"]
    every = os.sched_getaffinity(0)
    rounds = ((1, {min(every)}), (1, every), (arguments.jobs, every))
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        for measured in (False, True):
            for jobs, cores in rounds:
                count = arguments.trials if measured else jobs
                seeds = range(first, first + count)
                first += count
                records = sweep(Path(folder), seeds, jobs, cores, arguments)
                took = seconds(records)
                if measured:
                    lines.append(
                        f"| {jobs} | {len(cores)} | {count} | {took:.1f} | "
                        f"{3600 * count / took:.0f} | {overhead(records):.2f} |"
                    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
