"""Write the figures of docs/methods.md, and their drawing, from a finished sweep of methods.

    ptq4sam sweep exp/sweeps/methods.yaml --work-dir DIR ...
    python tools/write_methods.py DIR [--said TEXT]

The table and the drawing (docs/methods.svg) replace what is between the page's marks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_sets import machine

from ptq4sam.files import write_text
from ptq4sam.report.figures import QUANTIZED, bars
from ptq4sam.sweep.description import read_description
from ptq4sam.sweep.store import read_records
from ptq4sam.sweep.summary import Row, rows
from ptq4sam.sweep.tasks import Folder

_ROOT = Path(__file__).resolve().parents[1]
PAGE = _ROOT / "docs" / "methods.md"
DRAWING = PAGE.with_suffix(".svg")
BEGIN, END = "<!-- figures of the sweep -->", "<!-- end of the figures -->"
AXIS = "added"


def table(done: list[Row], said: str) -> str:
    """The trials, the best first, in Markdown."""
    first = done[0].record
    assert first is not None
    exact = float(first.metrics["float"]["mean_iou"])
    lines = [
        f"{said} Float: mean IoU {exact:.3f}. {first.metrics['masks']} objects on "
        f"{first.metrics['pictures']} pictures. Measured on {machine()}.",
        "",
        "![Agreement with the float model's masks, by method](methods.svg)",
        "",
        "| on top of PTQ4SAM-S, W4A4 | mean IoU | change | agreement |",
        "|---|---|---|---|",
    ]
    for row in done:
        iou, agreement = row.metric("mean_iou"), row.metric("agreement")
        assert iou is not None
        assert agreement is not None
        change = f"{100 * (iou - exact):+.1f}"
        name = row.trial.values[AXIS]
        lines.append(f"| {name} | {iou:.3f} | {change} | {agreement:.3f} |")
    return "\n".join(lines)


def drawing(done: list[Row]) -> str:
    """Agreement by method, as a file of its own."""
    names = [str(row.trial.values[AXIS]) for row in done]
    values = [row.metric("agreement") or 0.0 for row in done]
    label = "agreement with the float model's masks"
    drawn = bars(names, [(label, QUANTIZED, values)], label, label, numbers="{:.3f}")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return drawn.replace("<svg ", f"<svg {spaces} ", 1) + "\n"


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path, help="work directory of the sweep")
    parser.add_argument("--said", default="", help="how it was measured, in a sentence")
    arguments = parser.parse_args()
    folder = Folder(arguments.sweep)
    found = rows(read_description(folder.description), read_records(folder.store))
    done = [row for row in found if row.status == "done"]
    done.sort(key=lambda row: row.metric("agreement") or 0.0, reverse=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n\n{table(done, arguments.said)}\n\n{END}{after}"
    write_text(text, PAGE)
    write_text(drawing(done), DRAWING)


if __name__ == "__main__":
    main()
