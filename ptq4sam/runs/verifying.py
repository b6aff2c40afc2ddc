"""`ptq4sam verify`: a quantized model against its integer form, operators and masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam.columns import aligned
from ptq4sam.data import ImageFolder
from ptq4sam.data.scenes import generate_scene
from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.verify import OperatorCheck, verify_operators, worst_first
from ptq4sam.evaluation import mask_ious
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.numerics import reproducible
from ptq4sam.progress import Progress, silent
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

PICTURES = 4
"""How many pictures are used by default."""
NOISE = 1e-6
"""Deviation of the noise, in standard deviations of a picture, that the masks' agreement is
compared with."""

GOAL = 0.99
"""Mean IoU of the masks of a deployed model with those of the simulation that is promised."""

# Where nothing says what is in a picture: quarters, overlapping halves and the middle.
_BOXES = (
    (0.02, 0.02, 0.48, 0.48),
    (0.52, 0.52, 0.98, 0.98),
    (0.1, 0.3, 0.9, 0.7),
    (0.25, 0.25, 0.75, 0.75),
)
_WORST = 8


@dataclass(frozen=True)
class Subject:
    """A picture, RGB uint8 [height, width, 3], and boxes [n, 4] xyxy in its pixels."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        checks: every operator on the simulation's inputs.
        pictures: how many.
        agreement: IoU of each mask of the integer model with the simulation's.
        sensitivity: the same of the simulation with itself, noise added to its input: a network
            amplifies the rounding of a code, so that computations whose floats differ in their last
            bits agree no better.
    """

    checks: Sequence[OperatorCheck]
    pictures: int
    agreement: Sequence[float]
    sensitivity: Sequence[float]

    @property
    def passed(self) -> bool:
        """Whether every operator keeps the promises."""
        return all(check.kept for check in self.checks)

    def lines(self, width: int | None = None) -> list[str]:
        """The report for people, the worst operators first.

        Args:
            width: of the terminal; None for no limit.
        """
        broken = sum(not check.kept for check in self.checks)
        outputs = sum(check.outputs for check in self.checks)
        equal = sum(check.equal for check in self.checks) / max(1, outputs)
        exact = sum(check.exact for check in self.checks)
        verdict = "passed" if self.passed else f"FAILED in {broken} operators"
        titles = ["  worst operators", "equal\ncodes", "largest\nstep", "sums"]
        worst = map(self._cells, worst_first(self.checks)[:_WORST])
        return [
            f"verify {verdict}: {len(self.checks)} operators on {self.pictures} pictures, sums of "
            f"{exact} equal, {equal:.4%} of {outputs:,} output codes equal",
            *aligned([titles, *worst], width=width),
            f"masks of integer model and simulation: mean IoU {np.mean(self.agreement):.4f} of "
            f"{GOAL} promised ({len(self.agreement)} masks)",
            *self._below(),
            f"masks of the simulation with itself at {NOISE:g} of noise on its input: mean IoU "
            f"{np.mean(self.sensitivity):.4f}",
        ]

    def _below(self) -> list[str]:
        """What is said where masks differ more than they may."""
        if np.mean(self.agreement) >= GOAL:
            return []
        cause = "although" if self.passed else "and"
        operators = "every operator is right" if self.passed else "operators are wrong"
        return [
            f"! masks fall below the goal {cause} {operators}: the floats between them (layer "
            "norm, softmax, GELU, relative positions) differ"
        ]

    def _cells(self, check: OperatorCheck) -> list[str]:
        mark = " " if check.kept else "!"
        sums = "equal" if check.exact else "differ"
        return [f"{mark} {check.name}", f"{check.share:.4%}", f"{check.largest:.4f}", sums]


def generated_subjects(count: int = PICTURES) -> Iterable[Subject]:
    """Generated scenes with the boxes of their objects."""
    for seed in range(count):
        scene = generate_scene(seed)
        yield Subject(scene.image, np.stack([instance.box for instance in scene.instances]))


def pictured_subjects(
    folder: Path, count: int = PICTURES, recursive: bool = False
) -> Iterable[Subject]:
    """The first pictures of a folder, or of its subfolders too, with the same boxes in each.

    Raises:
        DataError: there are none, or one is damaged.
    """
    pictures = ImageFolder(folder, limit=count, recursive=recursive)
    for record in pictures.images:
        image = pictures.load(record)
        height, width = image.shape[:2]
        sides = np.array([width, height, width, height], np.float32)
        yield Subject(image, np.array(_BOXES, np.float32) * sides)


@reproducible()
def verify_model(
    sam: QuantizedSam, subjects: Iterable[Subject], progress: Progress = silent
) -> Verification:
    """Compare a frozen model with its integer form.

    Raises:
        DeployError: an operator has no exact integer form.
    """
    chosen = list(subjects)
    integer = integer_model(sam)
    masks: list[NDArray[np.bool_]] = []
    checks = verify_operators(
        sam,
        integer,
        lambda: masks.extend(
            _masks(sam, subject) for subject in progress(chosen, "comparing operators")
        ),
    )
    agreement: list[float] = []
    sensitivity: list[float] = []
    for subject, simulated in zip(progress(chosen, "comparing masks"), masks, strict=True):
        agreement += mask_ious(_masks(integer, subject), simulated).tolist()
        with _noisy(sam):
            sensitivity += mask_ious(_masks(sam, subject), simulated).tolist()
    return Verification(checks, len(chosen), agreement, sensitivity)


def _masks(sam: Sam, subject: Subject) -> NDArray[np.bool_]:
    """Masks [boxes, height, width] of one picture."""
    predictor = Predictor(sam)
    embedding = predictor.embed(subject.image)
    low_res = predictor.predict(boxes=subject.boxes, embedding=embedding).low_res
    found: NDArray[np.bool_] = predictor.binary_masks(low_res, embedding)[:, 0].cpu().numpy()
    return found


@contextlib.contextmanager
def _noisy(sam: Sam) -> Iterator[None]:
    """Add noise to what the image encoder sees within the `with` block."""
    generator = torch.Generator("cpu").manual_seed(0)

    def disturb(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        noise = torch.randn(inputs[0].shape, generator=generator, device="cpu")
        return inputs[0] + NOISE * noise.to(inputs[0].device)

    handle = sam.image_encoder.register_forward_pre_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
