"""A study's result as JSON, CSV and a table.

`sensitivity.json` holds

- `model`, `scheme`, `metric`, `prompts`, `pictures` (`proxy` and `measured`: how many), `seed`,
  `versions`;
- `float` and `quantized`: the whole models, each an effect as below; `quantized_on_proxy`: that on
  the proxy's pictures, which targets that were not measured compare with;
- `targets`, worst first: `name` (path, or path:role), `path`, `role` (empty: all), `grain`,
  `network`, `block`, `layer`, `bits` (of its quantizers, sorted), `quantizers` (paths), `rank`
  (from 1, of its grain), `measured` (whether on the larger set of pictures and with AP), and two
  effects: `only` (it alone quantized) and `all_but` (all quantized but it).

An effect has `embedding_sqnr_db` and `logits_sqnr_db` (null where there is no error),
`embedding_relative_error` and `logits_relative_error`, `agreement` and `mean_iou` in shares (the
latter null without truth), `AP` in percent (null where it was not measured).
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.files import write_json, write_text
from ptq4sam.studies.sensitivity.effects import Effect
from ptq4sam.studies.sensitivity.targets import Target

COLUMNS = (
    ("logits_sqnr_db", "dB", 1),
    ("agreement", "agree", 3),
    ("mean_iou", "IoU", 3),
    ("AP", "AP", 1),
)
_SHOWN = 25
"""Targets on the terminal."""


@dataclass(frozen=True)
class Row:
    """One target with what was found.

    Attributes:
        target: what was switched.
        bits: of its quantizers, sorted.
        only: it alone quantized.
        all_but: all quantized but it.
        measured: whether on the larger set of pictures.
        rank: of its grain, from 1.
    """

    target: Target
    bits: tuple[int, ...]
    only: Effect
    all_but: Effect
    measured: bool
    rank: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        network, block, layer = self.target.place
        return {
            "name": self.target.name,
            "path": self.target.path,
            "role": self.target.role,
            "grain": self.target.grain,
            "network": network,
            "block": block,
            "layer": layer,
            "bits": list(self.bits),
            "quantizers": sorted(self.target.quantizers),
            "rank": self.rank,
            "measured": self.measured,
            "only": dataclasses.asdict(self.only),
            "all_but": dataclasses.asdict(self.all_but),
        }


@dataclass(frozen=True)
class Sensitivities:
    """All of a study.

    Attributes:
        about: what it is of; see the module.
        float_effect: of the float model.
        quantized: of the whole quantized model.
        quantized_on_proxy: of the same on the proxy's pictures.
        rows: worst first.
    """

    about: dict[str, Any]
    float_effect: Effect
    quantized: Effect
    quantized_on_proxy: Effect
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.about,
            "float": dataclasses.asdict(self.float_effect),
            "quantized": dataclasses.asdict(self.quantized),
            "quantized_on_proxy": dataclasses.asdict(self.quantized_on_proxy),
            "targets": [row.to_dict() for row in self.rows],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write sensitivity.json and sensitivity.csv; returns the files."""
        paths = [folder / "sensitivity.json", folder / "sensitivity.csv"]
        write_json(self.to_dict(), paths[0])
        write_text(_csv(self.rows), paths[1])
        return paths

    def lines(self) -> list[list[str]]:
        """Cells of the table: titles, both whole models, then targets."""
        shown = [
            column
            for column in COLUMNS
            if any(getattr(row.only, column[0]) is not None for row in self.rows)
        ]
        titles = ["target", "bits"]
        for kind in ("only", "all\nbut"):
            titles += [f"{kind}\n{title}" for _, title, _ in shown]
        empty = [""] * len(shown)
        lines = [
            titles,
            ["float", "", *empty, *_cells(self.float_effect, shown)],
            ["quantized", "", *empty, *_cells(self.quantized, shown)],
            ["quantized *", "", *empty, *_cells(self.quantized_on_proxy, shown)],
        ]
        for row in self.rows[:_SHOWN]:
            name = f"{row.target.name}{'' if row.measured else ' *'}"
            bits = ", ".join(map(str, row.bits))
            lines.append([name, bits, *_cells(row.only, shown), *_cells(row.all_but, shown)])
        return lines

    @property
    def hidden(self) -> int:
        """Targets that the table leaves out."""
        return max(0, len(self.rows) - _SHOWN)


def _cells(effect: Effect, shown: Sequence[tuple[str, str, int]]) -> list[str]:
    values = [(getattr(effect, key), digits) for key, _, digits in shown]
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]


def _csv(rows: Sequence[Row]) -> str:
    """One line a target; an effect's values under only.* and all_but.*."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [effect.name for effect in dataclasses.fields(Effect)]
    plain = ["name", "grain", "network", "block", "layer", "role", "bits", "rank", "measured"]
    kinds = ("only", "all_but")
    writer.writerow([*plain, *(f"{kind}.{name}" for kind in kinds for name in names)])
    for row in rows:
        content = row.to_dict()
        content["bits"] = " ".join(map(str, row.bits))
        effects = [content[kind][name] for kind in kinds for name in names]
        writer.writerow([*(content[name] for name in plain), *effects])
    return text.getvalue()
