"""`ptq4sam sweep`: from its arguments to tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ptq4sam.commands.flags import add_limit, add_set
from ptq4sam.errors import ConfigError
from ptq4sam.records import split_assignment

if TYPE_CHECKING:
    from ptq4sam.sweep.grid import Sweep
    from ptq4sam.sweep.store import Store
    from ptq4sam.sweep.tasks import Folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam sweep`."""
    parser.add_argument(
        "file", type=Path, help="grid of trials: bits or another name of exp/sweeps/, or a file"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="default: work_dirs/sweeps/<name of the file>"
    )
    add_crew_arguments(parser)
    add_picture_arguments(parser)
    parser.add_argument("--prompts", help="prompt source, as of evaluate")
    add_set(parser, "settings of every trial that the grid does not set, e.g. steps=50")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and stop")


def add_crew_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of who does the trials, and of which."""
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="workers; default: 1, on Ray all there are"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="work on this Ray cluster: auto, host:port"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try failed trials again")


def require_jobs(jobs: int | None) -> None:
    """Refuse a number of workers that is none.

    Raises:
        ConfigError: it is below 1.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"asked for --jobs {jobs}: use 1 or more")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the pictures that trials are evaluated and calibrated on."""
    parser.add_argument("--images", type=Path, help="evaluate these pictures")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="COCO instances file")
    parser.add_argument(
        "--calibration-images", type=Path, metavar="D", help="calibrate on these pictures"
    )
    parser.add_argument(
        "--calibration-annotations", type=Path, metavar="B.json", help="their COCO instances file"
    )
    add_limit(parser, "evaluate the first N pictures only")


def run(parsed: argparse.Namespace) -> int:
    """Do what is left of a sweep and show all of it; 1 where trials have failed."""
    from ptq4sam.sweep.ended import ended_lines
    from ptq4sam.sweep.grid import read_sweep
    from ptq4sam.sweep.settings import require_pictures
    from ptq4sam.sweep.store import Store
    from ptq4sam.sweep.tasks import Folder

    require_jobs(parsed.jobs)
    sweep = read_sweep(parsed.file, overrides(parsed))
    folder = Folder(parsed.work_dir or Path("work_dirs") / "sweeps" / sweep.name)
    if parsed.dry_run:
        names = [trial.name for trial in sweep.trials]
        sys.stdout.write("".join(f"{line}\n" for line in (*names, *ended_lines(sweep, folder))))
        return 0
    for trial in sweep.trials:
        require_pictures(trial.settings)
    with Store(folder.store) as store:
        return _go_on(parsed, sweep, folder, store)


def overrides(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the command line sets for every trial.

    Raises:
        ConfigError: a value is not YAML, or as `pictures`.
    """
    found: dict[str, Any] = {}
    for assignment in parsed.set:
        key, text = split_assignment(assignment)
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment!r}: the value is not YAML") from None
    found.update(pictures(parsed))
    for name in ("prompts", "limit"):
        if getattr(parsed, name) is not None:
            found[name] = getattr(parsed, name)
    return found


def pictures(parsed: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The data sets that the command line names, by their place in the settings.

    Raises:
        ConfigError: pictures and annotations do not belong together.
    """
    found = {}
    for name, prefix in (("data", ""), ("calibration", "calibration_")):
        images = getattr(parsed, f"{prefix}images")
        annotations = getattr(parsed, f"{prefix}annotations")
        if (images is None) != (annotations is None):
            flag = f"--{prefix.replace('_', '-')}"
            raise ConfigError(f"{flag}images and {flag}annotations go together: give both")
        if images is not None:
            found[name] = {"images": str(images), "annotations": str(annotations)}
    return found


def _go_on(parsed: argparse.Namespace, sweep: Sweep, folder: Folder, store: Store) -> int:
    from rich.console import Console

    from ptq4sam.columns import terminal_width
    from ptq4sam.sweep.description import write_description
    from ptq4sam.sweep.live import tell
    from ptq4sam.sweep.running import Crew, finish
    from ptq4sam.sweep.summary import rows, write

    write_description(sweep, folder.description)
    state = finish(sweep, folder, store, Crew(parsed.jobs, parsed.ray), parsed.retry_failed)
    found = rows(sweep, state.records)
    tell(sweep, found, Console(soft_wrap=not sys.stdout.isatty()), terminal_width())
    for path in write(sweep, found, folder.path):
        sys.stdout.write(f"written to {path}\n")
    return 0 if all(row.status == "done" for row in found) else 1
