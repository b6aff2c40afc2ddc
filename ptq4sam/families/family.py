"""What a family of SAMs is: sizes, weights, and the description of its networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.records import FieldError, unknown_key
from ptq4sam.sam.decoder_description import DECODER
from ptq4sam.sam.description import Description, Foldable, Normalized, Place, Projected, Scaled
from ptq4sam.sam.geometry import Geometry, Normalization
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
    "with_sizes",
]

S = TypeVar("S")

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

    def of_other_sizes(self) -> Weights:
        """Those of the same SAM with other sizes, which nobody publishes."""
        return Weights(self.file, trained_by="ptq4sam distil")


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


@dataclass(frozen=True, eq=False)
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
        sized: the same with other sizes, which take the names of the family's own record; None
            where there are none. Raises a FieldError of one that is not known, or of another kind.
        build_unfolded: as `build` for its own side, with the batch normalisations that training
            needs and `fold` folds; None where there are none.
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
    sized: Callable[[str, Mapping[str, Any]], Variant] | None = None
    build_unfolded: Callable[[], Sam] | None = None


def with_sizes(size: S, changes: Mapping[str, Any]) -> S:
    """A family's record of sizes with some of them changed.

    Args:
        size: a frozen dataclass of numbers and tuples of numbers or names.
        changes: by field; lists become tuples.

    Raises:
        FieldError: there is no such size, or its value is of another kind.
    """
    known = [field.name for field in fields(size)]  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in known:
            raise unknown_key(key, known)
        own = getattr(size, key)
        given[key] = tuple(value) if isinstance(value, list) else value
        if type(given[key]) is not type(own):
            raise FieldError(key, f"{value!r} given, a value like {own!r} is needed")
    return replace(size, **given)  # type: ignore[type-var]
