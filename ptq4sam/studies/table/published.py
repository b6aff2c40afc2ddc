"""Published figures, from published.yaml beside this file."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.yaml_files import read_yaml

FLOAT = "float"
"""Among the methods: the model that nothing is quantized in."""

METHODS = {
    FLOAT: "float",
    "minmax": "MinMax",
    "percentile": "Percentile",
    "omse": "OMSE",
    "ptq4sam-s": "PTQ4SAM-S",
    "adaround": "AdaRound",
    "brecq": "BRECQ",
    "qdrop": "QDrop",
    "ptq4sam-l": "PTQ4SAM-L",
    "saq-sam": "SAQ-SAM (PCC)",
    "ahcptq": "AHCPTQ",
    "ahcq-sam": "AHCQ-SAM",
    "car-sam": "CAR-SAM",
}
"""Titles of the table's methods by their names in exp/, in PTQ4SAM's order, newer ones behind."""

BITS = (6, 4)
"""Of weights and activations."""

MARKS = {
    "P": "read in its authors' own text or repository",
    "S": "copied from others who state it",
    "M": "from memory, to be checked against the paper",
    "T": "by TensorRT on a device, float16 of the float model",
    "R": "the page of its repository, of older weights",
}

_FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Figure:
    """A published mask AP or mean IoU.

    Attributes:
        value: in percent; None where the paper says that the model collapsed.
        mark: how it is known, a key of MARKS.
        sizes: the same of large, medium and small objects; empty where none is known.
    """

    value: float | None
    mark: str
    sizes: tuple[float, ...] = ()

    def __str__(self) -> str:
        """As tables show it."""
        return f"{'-' if self.value is None else f'{self.value:.1f}'} {self.mark}"


@dataclass(frozen=True)
class Published:
    """What is published of one cell.

    Attributes:
        figure: the paper's; None where none is known.
        corrected: the same measured by others with everything quantized; None where none is known.
        inflated: whether activations stayed float when the paper's figure was measured.
        also: another figure of the same, of a device or of other weights.
    """

    figure: Figure | None = None
    corrected: Figure | None = None
    inflated: bool = False
    also: Figure | None = None

    @property
    def comparable(self) -> float | None:
        """The figure that one's own is to be compared with: the corrected one where there is."""
        best = self.corrected or self.figure
        return None if best is None else best.value


def published(detector: str, model: str, bits: int | None, method: str) -> Published:
    """What is published of a cell; nothing for a detector or model that no paper has."""
    content = _content()
    if model not in content["models"]:
        return Published()
    place = content["models"].index(model)
    if bits is None:
        return Published(_figure(content[FLOAT].get(detector), place))
    key = f"W{bits}A{bits}"
    figure = _figure(content[key].get(detector, {}).get(method), place)
    corrected = content["corrected"].get(key, {}).get(detector, {}).get(method)
    inflated = figure is not None and method in content["inflated"]
    return Published(figure, _figure(corrected, place), inflated)


def _figure(row: list[str | None] | None, place: int) -> Figure | None:
    if row is None or row[place] is None:
        return None
    value, mark = str(row[place]).split()
    return Figure(None if value == "-" else float(value), mark)


def published_of_family(table: str, measure: str, model: str, method: str) -> Published:
    """What is published of a cell of a family's table; nothing of a model that no paper has.

    Args:
        table: name of the table and of its file beside this one.
        measure: what was measured.
        model: the SAM.
        method: the scheme.
    """
    content = family_content(table)
    if model not in content["models"]:
        return Published()
    place = content["models"].index(model)

    def figure(part: Any) -> Figure | None:
        row = part.get(measure, {}).get(method)
        if row is None or row[place] is None:
            return None
        value, *sizes = map(float, row[place].split())
        return Figure(value, part["mark"], tuple(sizes))

    return Published(figure(content), also=figure(content["also"]))


@functools.cache
def _content() -> Any:
    return read_yaml(_FILE, "file of published figures")


@functools.cache
def family_content(table: str) -> Any:
    """The file of a family's table: its methods, models and published figures."""
    return read_yaml(_FILE.with_name(f"{table}.yaml"), "file of published figures")
