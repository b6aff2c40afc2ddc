"""A study's result as JSON, CSV and a table.

`sensitivity.json` holds

- `model`, `scheme`, `metric`, `prompts`, `pictures` (`proxy` and `measured`: how many), `seed`,
  `versions`;
- `float` and `quantized`: the whole models, each an effect as below; `quantized_on_proxy`: that on
  the proxy's pictures, which targets that were not measured compare with;
- `targets`, worst first: `name` (path, or path:role), `path`, `role` (empty: all), `grain`,
  `network`, `block`, `layer`, `bits` (of its quantizers, sorted), `quantizers` (paths), `rank`
  (from 1, of its grain), `measured` (whether on the larger set of pictures and with AP), and two
  effects: `only` (it alone quantized) and `all_but` (all quantized but it; null where each was
  measured alone). `megabytes_saved` (2^20 bytes of its weights against float16), and `published`:
  null, or what a published study measured of this layer alone, `mean_iou` by size and
  `megabytes_saved`; `published_float` beside the targets has that of the float model.

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

from ptq4sam.families.efficientvit.published import LayerResult
from ptq4sam.files import write_json, write_text
from ptq4sam.studies.sensitivity.effects import Effect
from ptq4sam.studies.sensitivity.targets import Target

COLUMNS = (
    ("logits_sqnr_db", "dB", 1),
    ("agreement", "agree", 3),
    ("mean_iou", "IoU", 3),
    ("AP", "AP", 1),
)
_BY_SIZE = (
    ("mean_iou_large", "large", 3),
    ("mean_iou_medium", "medium", 3),
    ("mean_iou_small", "small", 3),
)
"""Of effects; the latter where each target was measured alone."""
_SHOWN = 25
"""Targets on the terminal."""


@dataclass(frozen=True)
class Row:
    """One target with what was found.

    Attributes:
        target: what was switched.
        bits: of its quantizers, sorted.
        only: it alone quantized.
        all_but: all quantized but it; None where that was not measured.
        measured: whether on the larger set of pictures.
        rank: of its grain, from 1.
        megabytes_saved: by its weights against float16, of 2^20 bytes.
        published: what a study measured of this layer alone; None where none did.
    """

    target: Target
    bits: tuple[int, ...]
    only: Effect
    all_but: Effect | None
    measured: bool
    rank: int
    megabytes_saved: float = 0.0
    published: LayerResult | None = None

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
            "all_but": _plain(self.all_but),
            "megabytes_saved": self.megabytes_saved,
            "published": _plain(self.published),
        }


@dataclass(frozen=True)
class Sensitivities:
    """All of a study.

    Attributes:
        about: what it is of; see the module.
        float_effect: of the float model.
        quantized: of the whole quantized model.
        quantized_on_proxy: of the same on the proxy's pictures; None without a proxy.
        rows: worst first.
    """

    about: dict[str, Any]
    float_effect: Effect
    quantized: Effect
    quantized_on_proxy: Effect | None
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.about,
            "float": dataclasses.asdict(self.float_effect),
            "quantized": dataclasses.asdict(self.quantized),
            "quantized_on_proxy": _plain(self.quantized_on_proxy),
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
        if self.quantized_on_proxy is None:
            return self._lines_alone()
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

    def _lines_alone(self) -> list[list[str]]:
        """As `lines`, of targets that were measured alone, beside what was published of them."""
        shown = [column for column in COLUMNS if column[0] != "AP"]
        if self.float_effect.mean_iou is not None:
            shown += _BY_SIZE
        titles = ["target", "bits", *(title for _, title, _ in shown), "MB\nsaved"]
        lines = [
            ["float", "", *_cells(self.float_effect, shown), ""],
            ["quantized", "", *_cells(self.quantized, shown), ""],
        ]
        for row in self.rows[:_SHOWN]:
            bits = ", ".join(map(str, row.bits))
            saved = f"{row.megabytes_saved:.2f}"
            lines.append([row.target.name, bits, *_cells(row.only, shown), saved])
        if any(row.published for row in self.rows):
            titles.append("published\nIoU")
            known = self.about.get("published_float", {}).get("mean_iou")
            told = [None if row.published is None else row.published.mean_iou for row in self.rows]
            for line, value in zip(lines, [known, None, *told], strict=False):
                line.append("" if value is None else f"{value:.3f}")
        return [titles, *lines]

    @property
    def hidden(self) -> int:
        """Targets that the table leaves out."""
        return max(0, len(self.rows) - _SHOWN)


def _plain(record: Effect | LayerResult | None) -> dict[str, Any] | None:
    return None if record is None else dataclasses.asdict(record)


def _cells(effect: Effect | None, shown: Sequence[tuple[str, str, int]]) -> list[str]:
    values = [(getattr(effect, key, None), digits) for key, _, digits in shown]
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]


def _csv(rows: Sequence[Row]) -> str:
    """One line a target; an effect's values under only.* and all_but.*."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [effect.name for effect in dataclasses.fields(Effect)]
    plain = ["name", "grain", "network", "block", "layer", "role", "bits", "rank", "measured"]
    plain += ["megabytes_saved"]
    kinds = ("only", "all_but")
    published = [result.name for result in dataclasses.fields(LayerResult)]
    columns = [f"{kind}.{name}" for kind in kinds for name in names]
    writer.writerow([*plain, *columns, *(f"published.{name}" for name in published)])
    for row in rows:
        content = row.to_dict()
        content["bits"] = " ".join(map(str, row.bits))
        effects = [(content[kind] or {}).get(name) for kind in kinds for name in names]
        known = [(content["published"] or {}).get(name) for name in published]
        writer.writerow([*(content[name] for name in plain), *effects, *known])
    return text.getvalue()
