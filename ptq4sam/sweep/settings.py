"""What a trial can set: a scheme and everything around it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq4sam.data.images import check_limit
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.extensions import extensions_fingerprint
from ptq4sam.families import VARIANTS
from ptq4sam.prompts.spec import is_boxes_file
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.records import FieldError, Record
from ptq4sam.runs.settings import DEFAULT_MODEL, DataSettings, RunSettings

GENERATED_SCENES = 30
"""Scenes that a trial without a data set of its own is evaluated on."""


@dataclass(frozen=True)
class Pictures(Record):
    """A data set on disk: a folder of pictures and a COCO instances file."""

    images: Path
    annotations: Path

    def data(self) -> DataSettings:
        """As the settings of a run name it."""
        return DataSettings(self.images, self.annotations)


@dataclass(frozen=True)
class TrialSettings(Record):
    """One trial.

    Attributes:
        scheme: the quantization.
        bits: sets the bits of weights and activations in the scheme.
        steps: sets the reconstruction steps a unit in the scheme, with learning rates raised to
            match, as `Scheme.with_steps`.
        model: name of the SAM.
        checkpoint: its weights; None for those that ship with the package.
        quantize_encoder: quantize the image encoder too.
        data: what is evaluated; None for generated scenes.
        calibration: what is calibrated on; generated scenes with `data` None.
        limit: evaluate the first pictures only; of generated scenes GENERATED_SCENES by default.
        prompts: prompt source as `open_prompts` names it.
        calibration_prompts: that of the calibration pictures; None for `prompts`.
        prompting: how boxes prompt and how masks are scored.
        device: torch device; None for CUDA where there is one.
        seed: fixes every random choice.
    """

    scheme: Scheme
    bits: int | None = None
    steps: int | None = None
    model: str = DEFAULT_MODEL
    checkpoint: Path | None = None
    quantize_encoder: bool = True
    data: Pictures | None = None
    calibration: Pictures | None = None
    limit: int | None = None
    prompts: str = "ground-truth"
    calibration_prompts: str | None = None
    prompting: Prompting = field(default_factory=Prompting)
    device: str | None = None
    seed: int = 0

    def _validate(self) -> None:
        self._require(self.model in VARIANTS, "model", ", ".join(VARIANTS))
        self._require(0 <= self.seed < 2**32, "seed", f"0 to {2**32 - 1}")
        self._require(self.steps is None or self.steps >= 1, "steps", "1 or more")
        check_limit(self.limit)
        if (self.data is None) != (self.calibration is None):
            missing = "calibration" if self.calibration is None else "data"
            raise FieldError(
                missing, "missing; pictures to evaluate and to calibrate on go together"
            )
        if self.calibration_prompts is None and is_boxes_file(self.prompts):
            raise FieldError(
                "calibration_prompts", f"missing; the boxes of {self.prompts} are of other pictures"
            )
        scheme = self.scheme
        if self.bits is not None:
            scheme = scheme.with_bits(self.bits, self.bits)
        if self.steps is not None:
            scheme = scheme.with_steps(self.steps)
        # What is said in two ways is kept in one, so that equal trials are found equal.
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "bits", None)
        object.__setattr__(self, "steps", None)

    @classmethod
    def set_in(cls, mapping: dict[str, Any], key: str, value: object) -> None:
        """Set a field; one of the scheme as the scheme sets it.

        Raises:
            FieldError: there is no such place.
        """
        section, _, rest = key.partition(".")
        inner = mapping.get(section)
        if section != "scheme" or not rest or not isinstance(inner, dict):
            super().set_in(mapping, key, value)
            return
        try:
            Scheme.set_in(inner, rest, value)
        except FieldError as error:
            raise error.within(section) from None

    @property
    def evaluated(self) -> int | None:
        """How many pictures are evaluated at most."""
        return GENERATED_SCENES if self.data is None and self.limit is None else self.limit

    @property
    def boxes_to_calibrate(self) -> str:
        """Prompt source of the calibration pictures."""
        return self.calibration_prompts or self.prompts

    def run(self, work_dir: Path, boxes: Path, scenes: Path) -> RunSettings:
        """The same as the settings of a run.

        Args:
            work_dir: of the run, which goes on with what is finished there.
            boxes: where detections are kept.
            scenes: generated ones, for a trial without data sets of its own.
        """

        def data(pictures: Pictures | None, split: str) -> DataSettings:
            if pictures is not None:
                return pictures.data()
            return DataSettings(scenes / "images" / split, scenes / "annotations" / f"{split}.json")

        return RunSettings(
            model=self.model,
            data=data(self.data, "val"),
            prompts=self.prompts,
            work_dir=work_dir,
            checkpoint=self.checkpoint,
            scheme=self.scheme,
            quantize_encoder=self.quantize_encoder,
            calibration=data(self.calibration, "train"),
            calibration_prompts=self.calibration_prompts,
            prompting=self.prompting,
            limit=self.evaluated,
            device=self.device,
            seed=self.seed,
            cache_dir=boxes,
            resume=True,
        )

    def part(self, *names: str) -> dict[str, Any]:
        """Some fields, as plain values."""
        plain = self.to_dict()
        return {name: plain[name] for name in names}

    def key(self) -> str:
        """Identifies the trial: equal settings, equal key."""
        settings = {**self.to_dict(), "limit": self.evaluated}
        return digest(settings | with_extensions())


def with_extensions() -> dict[str, str]:
    """What a fingerprint of something that extensions take part in holds besides."""
    found = extensions_fingerprint()
    return {"extensions": found} if found else {}


def digest(value: object) -> str:
    """A short fingerprint of plain values, in which the order of keys counts as in a scheme."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def known_keys(kind: type[Record] = TrialSettings) -> Iterator[str]:
    """Dotted names of everything that a trial can set, sections included."""
    kinds = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        yield one.name
        inner = _section(kinds[one.name])
        if inner is not None:
            yield from (f"{one.name}.{key}" for key in known_keys(inner))


def _section(kind: Any) -> type[Record] | None:
    """The record that a field holds, if it holds one."""
    united = typing.get_origin(kind) in (typing.Union, types.UnionType)
    for option in typing.get_args(kind) if united else (kind,):
        if isinstance(option, type) and issubclass(option, Record):
            return option
    return None


def require_pictures(settings: TrialSettings) -> None:
    """Refuse data sets that are not there before anything is computed.

    Raises:
        ConfigError: a folder or file is missing.
    """
    for name in ("data", "calibration"):
        pictures: Pictures | None = getattr(settings, name)
        for path in () if pictures is None else (pictures.images, pictures.annotations):
            if not path.exists():
                raise ConfigError(
                    f"the sweep's {name} {path} is not there: name another, or leave data "
                    "and calibration away for generated scenes"
                )
