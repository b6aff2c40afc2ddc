"""Check everything that only a GPU can show, in one command of a few minutes.

    python tools/gpu_check.py --out FOLDER              # all checks, at most 8 minutes
    python tools/gpu_check.py --out FOLDER --minutes 4  # the short list
    python tools/gpu_check.py --out FOLDER --device cpu # a dry run in small, anywhere

Needs no network and no data. Packages that a machine lacks are installed from wheels in the folder
`wheels` of the checkout, for these checks alone; where they are not there either, it says which are
missing and how to get them. Each check is a process of its own with a deadline of its own: none
stops another. Findings are written as they come, a JSON line each (`gpu_check.jsonl`); at the end a
table for docs/benchmarks.md (`gpu_check.md`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

TOOLS = Path(__file__).resolve().parent
_PATIENCE = 4
"""Times longer that a check may take in a dry run, which a busy machine may do."""
TABLE, LINES = "gpu_check.md", "gpu_check.jsonl"
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scipy": "scipy",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "rich": "rich",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "pygments": "pygments",
    "safetensors": "safetensors",
    "psutil": "psutil",
    "filelock": "filelock",
    "pycocotools": "pycocotools",
}
"""Modules that the checks import, with the packages that have them."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: for the findings.
        seconds: its deadline.
        short: whether it is in the short list.
        function: of `gpu_checks_*.py`, as module:function.
        environment: variables that its process gets.
    """

    name: str
    seconds: int
    short: bool
    function: str
    environment: dict[str, str] = field(default_factory=dict)


CHECKS = (
    Check("environment", 30, True, "gpu_checks_model:environment"),
    Check("smoke", 80, True, "gpu_checks_model:smoke"),
    Check("bits", 80, True, "gpu_checks_numbers:bits"),
    Check(
        "bits, fused rounding", 60, False, "gpu_checks_numbers:kernels",
        {"TRITON_DEFAULT_FP_FUSION": "1"},
    ),
    Check(
        "bits, TF32 asked for", 40, False, "gpu_checks_numbers:sums",
        {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    ),
    Check("steps", 110, True, "gpu_checks_speed:steps"),
    Check("same again", 80, False, "gpu_checks_model:same_again"),
    Check("calibration", 70, False, "gpu_checks_speed:calibration"),
    Check("evaluation", 60, False, "gpu_checks_speed:evaluation"),
    Check("limits", 40, False, "gpu_checks_model:limits"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        what: was looked at.
        value: number or text.
        unit: of the number.
        passed: whether it is as it must be; None where nothing is demanded.
    """

    check: str
    what: str
    value: float | int | str
    unit: str = ""
    passed: bool | None = None


def missing() -> list[str]:
    """Packages that are not here."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def install(packages: list[str], wheels: Path) -> str:
    """Install packages from wheels, where processes started from now on find them.

    Returns:
        Why that could not be; else nothing.
    """
    if not any(wheels.glob("*.whl")):
        return (
            f"missing: {', '.join(packages)}, and no wheels in {wheels}: get them where there is a "
            f"network, for this machine's Python, by\n    pip download --no-deps --dest wheels "
            f"{' '.join(packages)}"
        )
    target = tempfile.mkdtemp(prefix="gpu_check.")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    command += ["--find-links", str(wheels), "--target", target, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    paths = filter(None, [target, os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return done.stderr.strip() if done.returncode else ""


def run_here(check: Check, device: str, small: bool) -> None:
    """Run a check in this process; findings go to standard output as JSON lines.

    Each finding of a check is (what, value, unit, passed), the last two at will.
    """
    sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
    module, _, name = check.function.partition(":")
    function = getattr(__import__(module), name)
    for found in function(device, small):
        line = json.dumps(asdict(Finding(check.name, *found)))
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def run_apart(check: Check, device: str, small: bool, seconds: float) -> Iterator[Finding]:
    """Run a check in a process of its own and give its findings as they come."""
    command = [sys.executable, __file__, "--run", check.name, "--device", device]
    command += ["--small"] if small else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **check.environment}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as complaints:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
        )
        overdue = threading.Timer(seconds, process.kill)
        overdue.start()
        try:
            yield from _findings(process.stdout)
        finally:
            overdue.cancel()
            process.kill()
            process.wait()
        if process.returncode:
            complaints.seek(0)
            late = time.monotonic() - started >= seconds
            why = f"stopped after {seconds:.0f} s" if late else complaints.read()[-1500:].strip()
            yield Finding(check.name, "ended", why, passed=False)
    yield Finding(check.name, "took", round(time.monotonic() - started, 1), "s")


def _findings(lines: IO[str] | None) -> Iterator[Finding]:
    for line in lines or ():
        # Libraries write to standard output too.
        if line.startswith('{"check"'):
            yield Finding(**json.loads(line))


def table(findings: list[Finding]) -> str:
    """All findings in Markdown."""
    rows = ["| check | what | found | as it must be |", "|---|---|---|---|"]
    words = {None: "", True: "yes", False: "**no**"}
    for found in findings:
        value = f"{found.value:.4g}" if isinstance(found.value, float) else str(found.value)
        text = " ".join(f"{value} {found.unit}".split()).replace("|", "/")
        rows.append(f"| {found.check} | {found.what} | {text[:300]} | {words[found.passed]} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run what fits into the time; 1 where anything is not as it must be, 2 if nothing can run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--wheels", type=Path, default=TOOLS.parent / "wheels")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--small", action="store_true", help="small sizes; always on a CPU")
    parser.add_argument("--run", choices=[check.name for check in CHECKS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small = arguments.small or arguments.device == "cpu"
    if arguments.run:
        run_here(next(c for c in CHECKS if c.name == arguments.run), arguments.device, small)
        return 0
    lacking = missing()
    problem = install(lacking, arguments.wheels) if lacking else ""
    if problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    chosen = [check for check in CHECKS if check.short or arguments.minutes > 4]
    if arguments.only:
        chosen = [check for check in CHECKS if check.name in arguments.only]
    arguments.out.mkdir(parents=True, exist_ok=True)
    # A kernel that another run has compiled would hide what compiling takes.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    findings: list[Finding] = []
    end = time.monotonic() + 60 * arguments.minutes
    with (arguments.out / LINES).open("w", encoding="utf-8") as lines:
        for check in chosen:
            left = end - time.monotonic() - 5
            if left < 10:
                run: Any = [Finding(check.name, "ended", "no time was left", passed=False)]
            else:
                allowed = check.seconds * (_PATIENCE if small else 1)
                run = run_apart(check, arguments.device, small, min(allowed, left))
            for found in run:
                findings.append(found)
                lines.write(json.dumps(asdict(found)) + "\n")
                lines.flush()
                sys.stdout.write(
                    f"{found.check}: {found.what}: {str(found.value)[:200]} {found.unit}\n"
                )
                sys.stdout.flush()
    (arguments.out / TABLE).write_text(table(findings), encoding="utf-8")
    return int(any(found.passed is False for found in findings))


if __name__ == "__main__":
    raise SystemExit(main())
