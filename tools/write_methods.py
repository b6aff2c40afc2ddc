"""Write the figures of docs/methods.md, and their drawing, from finished sweeps of methods.

    ptq4sam sweep exp/sweeps/methods.yaml --work-dir PHOTOS --images ... --annotations ... ...
    ptq4sam sweep exp/sweeps/methods.yaml --work-dir SCENES --limit 15
    python tools/write_methods.py PHOTOS SCENES [--said TEXT]

and with `--part` those of sweeps on top of PTQ4SAM-L (methods-l) and of tiny_vit_nano
(methods-tiny: `--set model=tiny_vit_nano`). The table and the drawing (docs/methods.svg,
docs/methods-l.svg, ...) replace what is between the page's marks. A seed counts when all of its
trials have ended.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from data_sets import machine

from ptq4sam.files import write_text
from ptq4sam.report.figures import FLOAT, QUANTIZED, bars
from ptq4sam.sweep.description import read_description
from ptq4sam.sweep.store import read_records
from ptq4sam.sweep.summary import Row, rows, spread
from ptq4sam.sweep.tasks import Folder

_ROOT = Path(__file__).resolve().parents[1]
PAGE = _ROOT / "docs" / "methods.md"
PARTS = {
    "methods": "PTQ4SAM-S, W4A4",
    "methods-l": "PTQ4SAM-L, W4A4",
    "methods-tiny": "PTQ4SAM-S, W4A4, of `tiny_vit_nano`",
}
"""What methods are added to, by part of the page, whose drawing is named like it."""
BEGIN, END = "<!-- figures of {} -->", "<!-- end of the figures of {} -->"
AXIS = "added"
TITLES = ("coco_mini val", "scenes")


@dataclass(frozen=True)
class Measured:
    """The trials of one sweep that have ended.

    Attributes:
        title: of the pictures.
        by_name: what was added, and its trials, one a seed.
    """

    title: str
    by_name: dict[str, list[Row]]

    @classmethod
    def of(cls, title: str, path: Path) -> Measured:
        """Read a work directory: the seeds that have ended for everything that was added."""
        folder = Folder(path)
        every = rows(read_description(folder.description), read_records(folder.store))
        waiting = {row.trial.values["seed"] for row in every if row.status != "done"}
        found: dict[str, list[Row]] = {}
        for row in every:
            if row.trial.values["seed"] not in waiting:
                found.setdefault(str(row.trial.values[AXIS]), []).append(row)
        return cls(title, found)

    def agreements(self, name: str) -> list[float]:
        """With the float model's masks, by seed."""
        return self._values(name, "agreement")

    def changes(self, name: str) -> list[float]:
        """Points of mean IoU, by seed."""
        return self._values(name, "change")

    def _values(self, name: str, metric: str) -> list[float]:
        values = [row.metric(metric) for row in self.by_name[name]]
        assert None not in values, f"{name} has no {metric}"
        return [value for value in values if value is not None]

    def said(self) -> str:
        """Float score, pictures and objects."""
        record = next(iter(self.by_name.values()))[0].record
        assert record is not None
        metrics = record.metrics
        return (
            f"{self.title}: {metrics['pictures']} pictures, {metrics['masks']} objects, float "
            f"{float(metrics['float']['mean_iou']):.3f}"
        )


def table(part: str, sweeps: list[Measured], names: list[str], said: str) -> str:
    """What was added, the best first, in Markdown."""
    seeds = max(len(found) for found in sweeps[0].by_name.values())
    told = "One seed."
    if seeds > 1:
        told = (
            f"{seeds} seeds, each with calibration pictures of its own: mean and standard "
            "deviation."
        )
    lines = [
        f"{said} {'; '.join(sweep.said() for sweep in sweeps)}. {told} Change is in points of mean "
        f"IoU. Measured on {machine()}.",
        "",
        f"![Agreement with the float model's masks, by method]({part}.svg)",
        "",
        f"| on top of {PARTS[part]} |"
        + "".join(f" {sweep.title}: change | agreement |" for sweep in sweeps),
        "|---|" + "---|---|" * len(sweeps),
    ]
    for name in names:
        cells = [name]
        for sweep in sweeps:
            cells += [spread(sweep.changes(name), True), spread(sweep.agreements(name), False)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drawing(sweeps: list[Measured], names: list[str]) -> str:
    """Agreement by method, as a file of its own."""
    series = [
        (sweep.title, colour, [statistics.mean(sweep.agreements(name)) for name in names])
        for sweep, colour in zip(sweeps, (QUANTIZED, FLOAT), strict=False)
    ]
    label = "agreement with the float model's masks"
    drawn = bars(names, series, label, label, numbers="{:.3f}")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return drawn.replace("<svg ", f"<svg {spaces} ", 1) + "\n"


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photographs", type=Path, help="work directory of a sweep")
    parser.add_argument("scenes", type=Path, nargs="?", help="that of one on scenes")
    parser.add_argument("--part", default="methods", choices=list(PARTS))
    parser.add_argument("--said", default="", help="how it was measured, in a sentence")
    arguments = parser.parse_args()
    folders = [path for path in (arguments.photographs, arguments.scenes) if path is not None]
    sweeps = [Measured.of(title, path) for title, path in zip(TITLES, folders, strict=False)]
    names = sorted(sweeps[0].by_name, key=lambda name: -statistics.mean(sweeps[0].agreements(name)))
    part = arguments.part
    begin, end = BEGIN.format(part), END.format(part)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    text = table(part, sweeps, names, arguments.said)
    write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", PAGE)
    write_text(drawing(sweeps, names), PAGE.with_name(f"{part}.svg"))


if __name__ == "__main__":
    main()
