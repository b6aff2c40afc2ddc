"""What takes the bytes of a quantized file, by part and against the float32 weights."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptq4sam.columns import aligned
from ptq4sam.deploy.container import checked_tensors, read_description
from ptq4sam.deploy.storage import CODES
from ptq4sam.families import variant_of
from ptq4sam.sam.description import Description

_FLOAT_BYTES = 4
_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.uint8: "u8", torch.bool: "bool"}
_SCALES = "scales, zero points, tau"


@dataclass(frozen=True)
class PartSize:
    """One part of a file.

    Attributes:
        name: what it is.
        kind: how its values are written.
        values: how many there are.
        size: bytes in the file.
        float_size: bytes of the same in float32; 0 for what a float model does not have.
    """

    name: str
    kind: str
    values: int
    size: int
    float_size: int


@dataclass(frozen=True)
class SizeReport:
    """A file by part, largest first, and in total (`float_size`: the float32 weights)."""

    parts: tuple[PartSize, ...]
    size: int
    float_size: int

    @property
    def share(self) -> float:
        """Size against float32, 0 to 1."""
        return self.size / self.float_size

    def summary(self) -> str:
        """The total in one line."""
        return (
            f"{self.size / 1e6:.2f} MB, {self.share:.1%} of the {self.float_size / 1e6:.2f} MB "
            "of its float32 weights"
        )

    def lines(self, width: int | None = None) -> list[str]:
        """The report as a table for people, with what its last column is.

        Args:
            width: of the terminal; None for no limit.
        """
        titles = ["part", "written as", "values", "MB", "float32\nMB", "share"]
        note = f"share: MB of the {self.float_size / 1e6:.2f} MB of all float32 weights"
        total = PartSize(
            "total", "", sum(part.values for part in self.parts), self.size, self.float_size
        )
        table = [titles, *map(self._cells, (*self.parts, total))]
        return [*aligned(table, left=(0, 1), width=width), note]

    def _cells(self, part: PartSize) -> list[str]:
        in_float = f"{part.float_size / 1e6:.2f}" if part.float_size else "-"
        share = f"{part.size / self.float_size:.2%}"
        size = f"{part.size / 1e6:.2f}"
        return [part.name, part.kind, f"{part.values:,}", size, in_float, share]


def size_report(path: str | Path) -> SizeReport:
    """Measure a quantized file, and compare each of its tensors with its checksum.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not of this format.
    """
    path = Path(path)
    description = read_description(path)
    networks = variant_of(description["model"]).family.description
    values: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for name, kind, count, size in _tensors(path, description):
        part = _part(networks, name)
        values[part] += count
        sizes[part] += size
        kinds[part].add(kind)
    total = path.stat().st_size
    parts = [
        PartSize(
            name,
            ", ".join(sorted(kinds[name])),
            count,
            sizes[name],
            0 if name == _SCALES else count * _FLOAT_BYTES,
        )
        for name, count in values.items()
    ]
    parts.append(PartSize("names, description, checksums", "json", 0, total - sizes.total(), 0))
    parts.sort(key=lambda part: -part.size)
    return SizeReport(tuple(parts), total, sum(part.float_size for part in parts))


def _tensors(path: Path, description: dict[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """Name, kind, number of values and bytes of every tensor."""
    weights = description.get("weights", {})
    for name, tensor in checked_tensors(path, description):
        if name.endswith(CODES):
            weight = weights[name.removesuffix(f".{CODES}")]
            yield name, f"{weight['bits']} bits", math.prod(weight["shape"]), tensor.nbytes
        else:
            yield name, _KINDS.get(tensor.dtype, str(tensor.dtype)), tensor.numel(), tensor.nbytes


def _part(description: Description, name: str) -> str:
    return _SCALES if "_quantizer." in name else description.size_of(name)
