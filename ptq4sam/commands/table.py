"""`ptq4sam table`: the published table, of what is here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ptq4sam.commands.flags import (
    add_decoder_only,
    add_device,
    add_seed,
    require_calibration_size,
)
from ptq4sam.commands.sweep import (
    add_crew_arguments,
    add_picture_arguments,
    pictures,
    require_jobs,
)
from ptq4sam.errors import ConfigError

if TYPE_CHECKING:
    from ptq4sam.studies.table.cells import Request
    from ptq4sam.studies.table.rows import Cell, Row

_COCO = "coco"
"""PTQ4SAM's table; the others are those of families."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam table`."""
    parser.add_argument(
        "table",
        metavar="TABLE",
        help="coco: PTQ4SAM's table of mask AP; efficientvit, tinysam: those of these families",
    )
    parser.add_argument(
        "--profile",
        default="coco",
        help="coco, or nano: the same rows of the embedded vit_nano, on generated scenes and "
        "coco_mini",
    )
    parser.add_argument(
        "--detectors",
        nargs="+",
        default=[],
        metavar="D",
        help="only of these; of a family's table coco-truth, coco-vitdet, lvis-truth, lvis-vitdet",
    )
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="M", help="vit_b, vit_l, vit_h, or a family's"
    )
    parser.add_argument(
        "--bits", nargs="+", default=[], metavar="B", help="6, 4; of a family's table also 8"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="M",
        help="as in exp/: minmax, ptq4sam-l, ...; float for the float model alone",
    )
    parser.add_argument(
        "--output",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="also write FILE.md, FILE.csv or FILE.tex",
    )
    add_picture_arguments(parser)
    parser.add_argument(
        "--coco-mini", type=Path, metavar="DIR", help="of --profile nano; default: data/coco_mini"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of reconstruction; default: 20,000")
    parser.add_argument(
        "--calibration-size", type=int, metavar="N", help="calibration pictures; default: 32"
    )
    add_decoder_only(parser)
    add_device(parser)
    add_seed(parser)
    add_crew_arguments(parser)
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="default: work_dirs/table/<profile>, of a family's table <table>-<profile>; the "
        "command goes on there",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cells and what is missing, and stop"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do what is left of the table and show all of it; 1 where cells failed or none can run."""
    from ptq4sam.studies.table import render
    from ptq4sam.studies.table.cells import Table, one_of
    from ptq4sam.studies.table.families import STUDIES, StudyTable

    one_of("name", parsed.table, (_COCO, *STUDIES))
    require_jobs(parsed.jobs)
    require_calibration_size(parsed.calibration_size)
    for path in parsed.output:
        render.require_form(path)
    request = _request(parsed)
    of_family = parsed.table != _COCO
    table = StudyTable(parsed.table, request) if of_family else Table(request)
    cells = list(table.cells())
    if parsed.dry_run:
        _list(cells)
        return 0
    rows = _fill(parsed, cells)
    _tell(rows)
    title = {"coco": "COCO val2017 mask AP", "nano": "The COCO table for vit_nano"}[parsed.profile]
    if of_family:
        title = STUDIES[parsed.table].title
    for path in parsed.output:
        render.write(path, rows, title, _notes(parsed.table, request))
        sys.stdout.write(f"written to {path}\n")
    if all(cell.missing for cell in cells):
        sys.stdout.write("no cell can run: get what is missing, or choose others\n")
        return 1
    return 1 if any(row.status == "failed" for row in rows) else 0


def _request(parsed: argparse.Namespace) -> Request:
    from ptq4sam.studies.table.cells import Request
    from ptq4sam.sweep.settings import Pictures

    given = pictures(parsed)
    if parsed.coco_mini is not None:
        if given or parsed.profile != "nano":
            raise ConfigError(
                "--coco-mini is a folder for --profile nano, instead of --images and the like"
            )
        folder = parsed.coco_mini
        for name, split in (("data", "val"), ("calibration", "train")):
            given[name] = {
                "images": str(folder / "images" / f"{split}2017"),
                "annotations": str(folder / "annotations" / f"instances_{split}.json"),
            }
    _require_there(given, parsed.coco_mini)
    return Request(
        profile=parsed.profile,
        detectors=parsed.detectors,
        models=parsed.models,
        bits=parsed.bits,
        methods=parsed.methods,
        limit=parsed.limit,
        steps=parsed.steps,
        calibrate=parsed.calibration_size,
        quantize_encoder=not parsed.decoder_only,
        device=parsed.device,
        seed=parsed.seed,
        **{name: Pictures.from_dict(value) for name, value in given.items()},
    )


def _require_there(given: Mapping[str, Mapping[str, str]], folder: Path | None) -> None:
    """Refuse pictures that were named and are not there: others would be scored instead.

    Args:
        given: as `pictures` has them.
        folder: of coco_mini, where they are named by it.
    """
    for name, paths in given.items():
        prefix = "calibration-" if name == "calibration" else ""
        for kind, path in paths.items():
            asked = f"--{prefix}{kind}" if folder is None else f"--coco-mini {folder}:"
            if not Path(path).exists():
                raise ConfigError(f"asked for {asked} {path}, which is not there: name another")


def _fill(parsed: argparse.Namespace, cells: Sequence[Cell]) -> list[Row]:
    """Run what is present and has not ended before."""
    from ptq4sam.studies.table.rows import rows, sweep_of
    from ptq4sam.sweep.description import write_description
    from ptq4sam.sweep.running import Crew, finish
    from ptq4sam.sweep.store import Store
    from ptq4sam.sweep.tasks import Folder

    name = parsed.profile if parsed.table == _COCO else f"{parsed.table}-{parsed.profile}"
    folder = Folder(parsed.work_dir or Path("work_dirs") / "table" / name)
    sweep, floats = sweep_of(f"table {parsed.table}", cells)
    with Store(folder.store) as store:
        write_description(sweep, folder.description)
        crew = Crew(parsed.jobs, parsed.ray)
        state = finish(sweep, folder, store, crew, parsed.retry_failed, floats)
    return list(rows(cells, state, folder))


def _list(cells: Sequence[Cell]) -> None:
    """The cells, those of a detector and a SAM that lack the same together."""
    from ptq4sam.columns import terminal_width, wrapped

    width = terminal_width()
    for (detector, model, lacks), group in groupby(
        cells, lambda cell: (cell.detector, cell.model, cell.lacks)
    ):
        state = f"missing {lacks}" if lacks else "can run"
        sys.stdout.write(f"{wrapped(f'{detector} {model}: {state}', width)}\n")
        widths: dict[str, list[str]] = {}
        for bits, some in groupby(group, lambda cell: cell.width):
            methods = ", ".join(dict.fromkeys(cell.method for cell in some))
            widths.setdefault(methods, []).append(bits)
        for methods, same in widths.items():
            text = methods if [methods] == same else f"{', '.join(same)}: {methods}"
            sys.stdout.write(f"{wrapped(text, width, '  ')}\n")
    present = sum(not cell.missing for cell in cells)
    sys.stdout.write(f"{len(cells)} cells, {present} of them can run\n")
    for line in _how_to_get(cells):
        sys.stdout.write(f"{line}\n")


def _tell(rows: Sequence[Row]) -> None:
    from rich.console import Console

    from ptq4sam.columns import terminal_width
    from ptq4sam.studies.table import render

    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(render.terminal(rows, terminal_width()))
    for line in [*render.legend(rows), *_how_to_get([row.cell for row in rows])]:
        console.print(line, markup=False, highlight=False)


def _how_to_get(cells: Sequence[Cell]) -> list[str]:
    """What to do for all that cells lack, a line each."""
    from ptq4sam.studies.table.cells import COCO_MINI
    from ptq4sam.studies.table.render import how_to_get

    missing = [one for cell in cells for one in cell.missing]
    lines = how_to_get(missing)
    if any(COCO_MINI.name in one.what for one in missing):
        lines.append(
            "give --coco-mini DIR, or --images, --annotations, --calibration-images and "
            "--calibration-annotations"
        )
    return lines


def _notes(table: str, request: Request) -> list[str]:
    """What was run, for whoever reads the table."""
    some = "" if request.limit is None else f", first {request.limit} pictures"
    if table != _COCO:
        given = request.calibrate
        size = "as many calibration pictures as each scheme asks for"
        size = size if given is None else f"{given} calibration pictures"
        return [
            f"Written by `ptq4sam table {table}`, profile {request.profile}: the schemes of exp/, "
            f"{size}; of three masks a box the best; seed {request.seed}{some}."
        ]
    steps = "20,000 steps a unit, as published"
    if request.steps is not None:
        raised = "with learning rates raised to match; published: 20,000"
        steps = f"{request.steps} steps a unit ({raised})"
    which = "image encoder and mask decoder" if request.quantize_encoder else "mask decoder"
    return [
        f"Written by `ptq4sam table coco`, profile {request.profile}: {which} quantized; "
        f"reconstruction {steps}; {request.calibrate or 32} calibration "
        f"pictures; seed {request.seed}{some}."
    ]
