"""What a run keeps of itself for its report, beside its metrics: one file in the work directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.errors import ConfigError, DataError
from ptq4sam.files import read_json, write_json
from ptq4sam.model.distributions import Distributions
from ptq4sam.records import Record

RECORD = "record.json"
"""Name of the file in a work directory."""
_VERSION = 1


@dataclass(frozen=True)
class UnitRecord(Record):
    """Reconstruction of one unit; fields as of `UnitLosses`."""

    name: str
    before: float
    after: float
    steps: int = 0
    fell_back: bool = False
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class PictureScore(Record):
    """One evaluated picture with boxes.

    Attributes:
        id: in the data set.
        name: of its file.
        masks: how many masks were compared.
        agreement: mean IoU of the masks with the float model's; None without one.
        iou: mean IoU of the masks with the truth; None where prompts are not ground truth.
        float_iou: the same of the float model.
    """

    id: int
    name: str
    masks: int
    agreement: float | None = None
    iou: float | None = None
    float_iou: float | None = None

    @property
    def rank(self) -> float | None:
        """What is worst first: agreement, or else the IoU."""
        return self.iou if self.agreement is None else self.agreement


@dataclass(frozen=True)
class PictureRecord(Record):
    """One of the worst pictures.

    Attributes:
        score: of it.
        width: pixels of what is kept.
        height: pixels.
        image: data URI of the picture.
        quantized: data URI of the evaluated model's masks, transparent elsewhere.
        reference: the same of the float model; None without one.
        difference: pixels that only one of them has; None without a float model.
    """

    score: PictureScore
    width: int
    height: int
    image: str
    quantized: str
    reference: str | None = None
    difference: str | None = None


@dataclass(frozen=True)
class PartRecord(Record):
    """A part of the quantized file; fields as of `PartSize`."""

    name: str
    kind: str
    values: int
    size: int
    float_size: int


@dataclass(frozen=True)
class RunRecord(Record):
    """All that a report shows and metrics.json has not.

    Attributes:
        version: of this format.
        distributions: of a run that calibrated.
        units: of a run that reconstructed, in order.
        scores: of all pictures with boxes.
        threshold: of the masks' scores: masks below it do not count in `scores`.
        worst: the pictures that agree least, the worst first.
        file: the quantized file that was written, by part.
    """

    version: int = _VERSION
    distributions: Distributions | None = None
    units: tuple[UnitRecord, ...] = ()
    scores: tuple[PictureScore, ...] = ()
    threshold: float = 0.0
    worst: tuple[PictureRecord, ...] = ()
    file: tuple[PartRecord, ...] = ()

    def write(self, folder: Path) -> None:
        """Write it into a work directory."""
        write_json(self.to_dict(), folder / RECORD, compact=True)

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read it from a work directory.

        Raises:
            DataError: it is missing, damaged or of another version.
        """
        path = folder / RECORD
        content, _ = read_json(path, "record of a run")
        version = content.get("version") if isinstance(content, Mapping) else None
        if version != _VERSION:
            raise DataError(f"{path} is of format {version}, not {_VERSION}: run again to renew it")
        try:
            return cls.from_dict(content, path)
        except ConfigError as error:
            raise DataError(f"{error}: the record is damaged, run again to renew it") from error


def unit_records(parts: Mapping[str, Mapping[str, Any]]) -> tuple[UnitRecord, ...]:
    """The units among the finished parts of a journal."""
    return tuple(
        UnitRecord.from_dict({"name": name, **{k: v for k, v in part.items() if k != "file"}})
        for name, part in parts.items()
        if "before" in part
    )
