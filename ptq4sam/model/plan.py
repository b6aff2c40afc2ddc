"""What a quantization will take, before it starts: units, bytes, and shares of the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.model.calibration import CalibrationItem, box_groups
from ptq4sam.model.insertion import ENCODER, TRANSFORMER
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.stages import Stage, State
from ptq4sam.sizes import format_bytes


@dataclass(frozen=True)
class UnitPlan:
    """One unit.

    Attributes:
        name: its path in the model.
        cached_bytes: activations held for it, of all pictures: its inputs in both models, its
            float answer, and what flows around it.
        forward_seconds: a float forward of one picture, the measure of its share of the time.
    """

    name: str
    cached_bytes: int
    forward_seconds: float


@dataclass(frozen=True)
class Plan:
    """All units in execution order, and what they share."""

    units: list[UnitPlan]
    pictures: int
    steps: int
    budget: int

    @property
    def peak(self) -> UnitPlan:
        """The unit that holds most activations."""
        return max(self.units, key=lambda unit: unit.cached_bytes)

    def share(self, done: int) -> float:
        """Share of the reconstruction's time that the first `done` units take, by forwards."""
        seconds = [unit.forward_seconds for unit in self.units]
        return sum(seconds[:done]) / sum(seconds)

    def lines(self) -> list[str]:
        """The plan in words."""
        forward = sum(unit.forward_seconds for unit in self.units)
        if self.steps == 0:
            return [
                f"plan: {len(self.units)} units, calibration on {self.pictures} pictures without "
                f"reconstruction; a float forward took {forward:.2f} s"
            ]
        peak = self.peak
        over = peak.cached_bytes - self.budget
        where = "fits" if over <= 0 else f"{format_bytes(over)} of it goes elsewhere"
        return [
            f"plan: {len(self.units)} units, {self.pictures} pictures, {self.steps} steps a unit",
            f"plan: activations take up to {format_bytes(peak.cached_bytes)} (at {peak.name}); "
            f"the memory budget is {format_bytes(self.budget)}: {where}",
            f"plan: a float forward took {forward:.2f} s; the time left is told after each unit",
        ]


@torch.no_grad()
def make_plan(
    sam: Sam,
    items: Sequence[CalibrationItem],
    scheme: Scheme,
    *,
    quantize_encoder: bool,
    budget: int,
) -> Plan:
    """Plan by a float forward of the first picture.

    Args:
        sam: the float model.
        items: calibration pictures; the decoder's share grows with their boxes.
        scheme: the quantization.
        quantize_encoder: as for `quantize_sam`.
        budget: bytes of memory for activations.

    Raises:
        CalibrationError: there are no pictures.
    """
    if len(items) == 0:
        raise CalibrationError("calibration needs at least 1 picture, found 0")
    first = items[0]
    state = sam.image_encoder.begin(first.pixels.to(sam.device))
    encoder, state = _walk(ENCODER, sam.image_encoder.stages(), state, len(items))
    boxes = sum(len(item.boxes) for item in items)
    # A group at once, as reconstruction takes them.
    group = box_groups(first.boxes)[0]
    sparse, dense = sam.prompt_encoder(boxes=group.to(sam.device))
    positions = sam.prompt_encoder.dense_positions()
    state = sam.mask_decoder.begin(state[0], positions, sparse, dense)
    joint = scheme.recon is not None and scheme.recon.granularity == "joint"
    stages = sam.transformer.stages(joint=joint)
    decoder, _ = _walk(TRANSFORMER, stages, state, boxes / len(group))
    units = [*encoder, *decoder] if quantize_encoder else decoder
    steps = 0 if scheme.recon is None else scheme.recon.iters
    return Plan(units, len(items), steps, budget)


def _walk(
    path: str, stages: Sequence[Stage], state: State, times: float
) -> tuple[list[UnitPlan], State]:
    """Plan stages by running them; all pictures have `times` one picture's bytes."""
    units = []
    for stage in stages:
        arguments = stage.enter(state)
        answer, seconds = _timed(stage.unit, arguments)
        if answer.device.type != "cpu":
            # The first call on a GPU loads kernels, which takes a thousand times as long.
            answer, seconds = _timed(stage.unit, arguments)
        # Of both models: the state and the inputs; of the float one the answer.
        held = 2 * _bytes(state) + 2 * _bytes(arguments) + _bytes((answer,))
        state = stage.leave(state, answer)
        units.append(UnitPlan(f"{path}.{stage.name}", int(held * times), seconds))
    return units, state


def _timed(unit: nn.Module, arguments: State) -> tuple[Tensor, float]:
    started = time.perf_counter()
    answer: Tensor = unit(*arguments)
    if answer.device.type in ("cuda", "xpu", "mps"):
        getattr(torch, answer.device.type).synchronize()
    return answer, time.perf_counter() - started


def _bytes(tensors: Sequence[Tensor]) -> int:
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.itemsize for tensor in unique.values())
