"""What a family of SAMs is: sizes, weights, and the description of its networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.sam.description import (
    DECODER,
    Description,
    Foldable,
    Geometry,
    Normalization,
    Normalized,
    Place,
    Projected,
    Scaled,
)
from ptq4sam.sam.model import Sam

__all__ = [
    "ASSETS",
    "DECODER",
    "Description",
    "Family",
    "Foldable",
    "Geometry",
    "Normalization",
    "Normalized",
    "Place",
    "Projected",
    "Scaled",
    "Variant",
    "Weights",
    "require_side",
]

ASSETS = Path(__file__).resolve().parents[1] / "assets"
"""Where weights that ship with the package are."""


@dataclass(frozen=True)
class Weights:
    """Weights of a variant.

    Attributes:
        file: its usual name.
        download: name for `ptq4sam download`: address and checksum are in the family's own
            weights.json; None where nothing can be downloaded.
        source: where it is published.
        trained_by: command that makes it, where it neither ships nor is published.
    """

    file: str
    download: str | None = None
    source: str = "github.com/facebookresearch/segment-anything"
    trained_by: str | None = None

    @property
    def embedded(self) -> Path | None:
        """The file, where it ships with the package."""
        ships = self.download is None and self.trained_by is None
        return ASSETS / self.file if ships else None


def require_side(name: str, side: int, cell: int, whose: str) -> None:
    """Refuse a side of pictures that is no multiple of a cell.

    Args:
        name: of the variant.
        side: in pixels.
        cell: in pixels.
        whose: what has cells of that size, for the message.

    Raises:
        ConfigError: it is none.
    """
    if side < cell or side % cell:
        raise ConfigError(
            f"asked for {name} with an input of {side} pixels: use a multiple of its {whose} {cell}"
        )


@dataclass(frozen=True)
class Family:
    """SAMs with encoders of one kind.

    Attributes:
        name: of its folder.
        description: of its encoder; what it shares with others is DECODER.
        fingerprint: found in the name of a tensor of each of its state dicts, and of no other
            family's.
        fold: from a state dict as it was published (also under other names) to ours.
        read_directory: tensors of a variant in a directory of its publisher; None where there are
            no such directories.
    """

    name: str
    description: Description
    fingerprint: str
    fold: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    read_directory: Callable[[str, Path], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Variant:
    """One SAM by name.

    Attributes:
        name: on the command line.
        family: of which it is one.
        geometry: of its pictures.
        build: it with random weights; takes another side of its input in pixels, or None. Raises a
            ConfigError where it cannot have that side.
        weights: where they are.
        side_of: side of the input that a state dict (after `fold`) was trained for; takes the state
            and its origin, for messages.
        fit: a tensor as this variant holds it; takes name, tensor and the model's own.
        remake: from another variant's state dict (after `fold`), whose weights it shares.
        unfolded: the same with batch normalisations where the family folds them and a published
            study simulates it; None for no such form.
        everything: settings of automatic masks that suit its weights better than SAM's own, by the
            names of `EverythingSettings`.
    """

    name: str
    family: Family
    geometry: Geometry
    build: Callable[[int | None], Sam]
    weights: Weights
    side_of: Callable[[Mapping[str, Tensor], str], int]
    fit: Callable[[str, Tensor, Tensor], Tensor] = lambda _name, tensor, _own: tensor
    remake: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    unfolded: Variant | None = None
    everything: Mapping[str, Any] = field(default_factory=dict)
