"""What a distillation is asked to do, as a record that a YAML file holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ptq4sam.errors import ConfigError
from ptq4sam.records import Record
from ptq4sam.yaml_files import read_yaml


@dataclass(frozen=True)
class Terms(Record):
    """Weights of the terms of the loss; 0 leaves one out.

    The first three compare with the teacher (TinySAM, Shu et al. 2025, which does not publish their
    weights), the others with the truth.

    Attributes:
        embedding: L1 distance of image embeddings.
        token: L1 distance of the decoder's output tokens behind its transformer.
        mask: L1 distance of mask logits.
        hardness: weigh masks by how far the student is behind the teacher on them.
        focal: focal loss of masks (Lin et al. 2017) without its class balance; 20 to a dice of 1,
            as in SAM's paper.
        dice: dice loss of masks.
        iou: L1 distance of predicted IoUs from those that masks have.
    """

    embedding: float = 1.0
    token: float = 1.0
    mask: float = 0.1
    hardness: bool = True
    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0

    def _validate(self) -> None:
        for name in ("embedding", "token", "mask", "focal", "dice", "iou"):
            self._require(getattr(self, name) >= 0, name, "0 or more")

    @property
    def by_teacher(self) -> bool:
        """Whether anything is compared with a teacher."""
        return self.embedding + self.token + self.mask > 0

    def weight_of(self, term: str) -> float:
        """The weight of a term; focal and dice loss are weighed within theirs, the truth."""
        return 1.0 if term == "truth" else float(getattr(self, term))

    @property
    def of_masks(self) -> bool:
        """Whether prompts are decoded at all."""
        return self.token + self.mask + self.focal + self.dice + self.iou > 0


@dataclass(frozen=True)
class Phase(Record):
    """One stretch of training, which starts from the averaged weights of the one before.

    The learning rate rises linearly, then falls as a cosine.

    Attributes:
        steps: of the optimiser.
        batch: pictures of a step, of all processes together.
        rate: the highest learning rate.
        final_rate: the last one.
        warm_up: steps that the rate rises.
        terms: of the loss.
    """

    steps: int = 10_000
    batch: int = 4
    rate: float = 1e-3
    final_rate: float = 1e-5
    warm_up: int = 200
    terms: Terms = field(default_factory=Terms)

    def _validate(self) -> None:
        self._require(self.steps >= 1, "steps", "1 or more")
        self._require(self.batch >= 1, "batch", "1 or more")
        self._require(self.rate > 0, "rate", "above 0")
        self._require(0 <= self.final_rate <= self.rate, "final_rate", "0 to the rate")
        self._require(self.warm_up >= 0, "warm_up", "0 or more")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return warm * (self.final_rate + (self.rate - self.final_rate) * cosine)


@dataclass(frozen=True)
class Source(Record):
    """Photographs of one annotations file, and how often they are shown.

    Attributes:
        images: folder.
        annotations: COCO instances file.
        weight: how often a photograph is shown, against 1.
        weights: the same for those whose `source` in the file is named.
    """

    images: Path
    annotations: Path
    weight: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)

    def _validate(self) -> None:
        self._require(self.weight >= 0, "weight", "0 or more")
        self._require(min(self.weights.values(), default=0) >= 0, "weights", "0 or more each")

    def below(self, folder: Path) -> Source:
        """The same with paths below a folder."""
        return Source(
            folder / self.images, folder / self.annotations, self.weight, dict(self.weights)
        )


@dataclass(frozen=True)
class Sampling(Record):
    """What a step shows and asks.

    Attributes:
        scenes: share of generated scenes among the pictures; without photographs all are.
        objects: of a picture, at most.
        boxes: share of the objects that are asked by a box first; the others are by a click. The
            published sampling is of clicks alone.
        rounds: the number of further clicks, each where the mask so far is wrong, is drawn from 0
            to this one.
        smallest: pictures are shown between this many times the size of an evaluation and
        largest: this many times; half of them at its size.
    """

    scenes: float = 0.25
    objects: int = 6
    boxes: float = 0.5
    rounds: int = 9
    smallest: float = 0.6
    largest: float = 2.0

    def _validate(self) -> None:
        self._require(0 <= self.scenes <= 1, "scenes", "0 to 1")
        self._require(self.objects >= 1, "objects", "1 or more")
        self._require(0 <= self.boxes <= 1, "boxes", "0 to 1")
        self._require(self.rounds >= 0, "rounds", "0 or more")
        self._require(0 < self.smallest <= self.largest, "smallest", "above 0, to largest")


@dataclass(frozen=True)
class DistillationSettings(Record):
    """A distillation.

    Attributes:
        student: name of a SAM, perhaps with sizes of its own (vit_nano:embed_dim=80).
        teacher: name of a SAM; None to learn from the truth alone, of a quantized student for the
            float model that it is made of.
        data: photographs.
        sampling: of pictures and prompts.
        phases: one after the other.
        train: everything, or the image encoder alone.
        decay: of the moving average of weights, which is the result.
        weight_decay: AdamW's, of all but biases and normalisations.
        clip: largest norm of the gradient.
        scale_rate: learning rate of a quantized student's scales, as a share of the phase's.
        precision: of products; None for bfloat16 on CUDA and float32 elsewhere. A quantized student
            learns in float32.
        float_weights: what weights are written as; a quantized student's as its scheme says.
        seed: fixes every random choice.
    """

    student: str = "tiny_vit_nano"
    teacher: str | None = None
    data: tuple[Source, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    phases: tuple[Phase, ...] = (Phase(),)
    train: Literal["all", "encoder"] = "all"
    decay: float = 0.999
    weight_decay: float = 0.05
    clip: float = 1.0
    scale_rate: float = 0.1
    precision: Literal["float32", "bfloat16"] | None = None
    float_weights: Literal["float32", "float16"] = "float32"
    seed: int = 0

    def _validate(self) -> None:
        self._require(len(self.phases) >= 1, "phases", "at least one")
        self._require(0 <= self.decay < 1, "decay", "0 to below 1")
        self._require(self.weight_decay >= 0, "weight_decay", "0 or more")
        self._require(self.clip > 0, "clip", "above 0")
        self._require(self.scale_rate > 0, "scale_rate", "above 0")
        self._require(self.seed >= 0, "seed", "0 or more")

    @classmethod
    def read(cls, path: Path, others: DistillationSettings | None = None) -> DistillationSettings:
        """Read a YAML file.

        Args:
            path: the file.
            others: have what the file does not say; None for the defaults.

        Raises:
            ConfigError: it is not there, or a setting is unknown or not usable.
        """
        said = read_yaml(path, "settings file")
        if others is not None and isinstance(said, dict):
            said = {**others.to_dict(), **said}
        return cls.from_dict(said, path)

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def require_something_to_learn(self, has_teacher: bool) -> None:
        """Refuse a phase whose loss has no term.

        Raises:
            ConfigError: it has none; the message says why.
        """
        for number, phase in enumerate(self.phases):
            terms = phase.terms
            if not has_teacher and terms.focal + terms.dice == 0:
                raise ConfigError(
                    f"phases.{number}: its terms that teach masks compare with a teacher alone, "
                    "and there is none: name one, or give focal or dice a weight"
                )
            if terms.embedding + terms.token + terms.mask + terms.focal + terms.dice == 0:
                raise ConfigError(
                    f"phases.{number}.terms: no term teaches masks: give one a weight above 0"
                )


FINE_TUNING = DistillationSettings(
    student="vit_nano", phases=(Phase(2000, rate=1e-4, final_rate=1e-6, warm_up=100),)
)
"""Defaults where a trained SAM learns with quantizers."""
