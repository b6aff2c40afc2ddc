"""Reconstruction of one unit: learn rounding and activation scales so that outputs come back.

BRECQ's block-wise objective (Li et al., 2021) with QDrop's random dropping of quantization (Wei et
al., 2022) and AdaRound's rounding (Nagel et al., 2020). It works on tensors: whoever calls it
captures the inputs and targets.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods import graphs
from ptq4sam.methods.precision import product_precision
from ptq4sam.methods.prefetch import prefetched
from ptq4sam.methods.schedule import Schedule
from ptq4sam.operators.arithmetic import learning
from ptq4sam.quantization.dropping import keep_some_float
from ptq4sam.quantization.modes import dropping, quantizers
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.recon import Reconstruction
from ptq4sam.quantization.rounding import AdaRoundQuantizer

_log = logging.getLogger(__name__)

_LOOK_EVERY = 50
"""Steps between two looks at the loss."""

CURVE_POINTS = 200
"""Most values that are kept of a unit's errors."""


@dataclass(frozen=True)
class UnitData:
    """What a unit saw and should give, one entry a batch: a picture, or some boxes of one.

    Attributes:
        inputs: arguments of the unit in the quantized model.
        float_inputs: the same in the float model.
        targets: output of the unit in the float model, alone in its tuple.
    """

    inputs: Sequence[tuple[Tensor, ...]]
    float_inputs: Sequence[tuple[Tensor, ...]]
    targets: Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class UnitLosses:
    """Output error of a unit over all batches, everything quantized.

    Attributes:
        before: rounded to nearest.
        after: as it was left.
        steps: how many were made.
        fell_back: learning made it worse, and it was left rounded to nearest.
        curve: the error while learning (of single batches, with what is dropped), averaged over
            equal numbers of steps: at most CURVE_POINTS values.
    """

    before: float
    after: float
    steps: int = 0
    fell_back: bool = False
    curve: tuple[float, ...] = ()


def output_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over axis 1, averaged over the others (QDrop's objective)."""
    # One kernel each way: written out, a step passes over memory five times more often.
    total = nn.functional.mse_loss(output, target, reduction="sum")
    return total * (target.shape[1] / target.numel())


def mean_error(name: str, unit: nn.Module, data: UnitData) -> float:
    """Mean output error of the unit as it is, over all batches.

    Raises:
        CalibrationError: that of a batch is not finite.
    """
    with torch.no_grad():
        errors = [
            float(output_error(unit(*inputs), target))
            for inputs, (target,) in zip(data.inputs, data.targets, strict=True)
        ]
    for index, error in enumerate(errors):
        if not math.isfinite(error):
            raise CalibrationError(
                f"{name} gives values that are not finite on calibration batch {index} (a picture, "
                "or some boxes of one): check the weights and that picture"
            )
    return math.fsum(errors) / len(errors)


def reconstruct_unit(
    name: str,
    unit: nn.Module,
    weights: Sequence[tuple[Tensor, Quantizer]],
    data: UnitData,
    settings: Reconstruction,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]] = iter,
    *,
    fall_back: bool = True,
) -> UnitLosses:
    """Learn a unit's rounding and activation scales, and leave it rounded hard.

    Args:
        name: of the unit, for messages.
        unit: module whose quantizers are calibrated.
        weights: each weight of the unit with its quantizer.
        data: captured inputs and targets.
        settings: the scheme's `recon` section.
        generator: source of every random choice, in this order: the batches of all steps; then step
            by step, which elements of each argument stay the float model's, and which of each
            activation stay float, in the order of the forward pass.
        progress: wraps the range of steps to show how far it is.
        fall_back: put a unit that learning made worse back to rounding to nearest.

    Returns:
        The error before and after, both with everything quantized and nothing dropped.

    Raises:
        CalibrationError: an activation or the loss is not finite.
    """
    before = mean_error(name, unit, data)
    start = {key: value.clone() for key, value in unit.state_dict().items()}
    rounding: list[AdaRoundQuantizer] = []
    if settings.learn_rounding:
        for weight, quantizer in weights:
            if quantizer.learns_rounding:
                rounding.append(cast(AdaRoundQuantizer, quantizer))
                rounding[-1].begin_learning(weight)
    grids = _learned_grids(unit) if settings.learn_scale else []
    alphas = [quantizer.alpha for quantizer in rounding]
    with (
        learning(unit),
        dropping(unit, settings.drop_prob, generator),
        _with_gradients([*alphas, *_parameters(grids)]),
    ):
        errors: list[float] = []
        if alphas or grids:
            errors = _optimize(name, unit, rounding, grids, data, settings, generator, progress)
    for learner in (*rounding, *grids):
        learner.finish_learning()
    after = mean_error(name, unit, data)
    if after <= before or not fall_back:
        return UnitLosses(before, after, len(errors), curve=_curve(errors))
    # One unit of many is no news; whoever sees all of them warns where it is.
    _log.info(
        "%s became worse by learning (error %.4g, %.4g before): it is left rounded to nearest",
        name,
        after,
        before,
    )
    unit.load_state_dict(start)
    return UnitLosses(before, before, len(errors), fell_back=True, curve=_curve(errors))


def _curve(errors: Sequence[float]) -> tuple[float, ...]:
    """Errors of all steps, averaged over equal numbers of steps, the last perhaps fewer."""
    together = max(1, math.ceil(len(errors) / CURVE_POINTS))
    parts = (errors[first : first + together] for first in range(0, len(errors), together))
    return tuple(math.fsum(part) / len(part) for part in parts)


class _Step:
    """One step of learning: all of it on the device, so that it can be recorded and replayed.

    What changes from step to step is in tensors that stay where they are.

    Args:
        unit: under reconstruction.
        rounding: quantizers whose rounding is learned.
        grids: quantizers whose scales are learned.
        settings: the scheme's `recon` section.
        generator: source of what is dropped.
        recorded: steps will be.
    """

    def __init__(
        self,
        unit: nn.Module,
        rounding: Sequence[AdaRoundQuantizer],
        grids: Sequence[Quantizer],
        settings: Reconstruction,
        generator: torch.Generator,
        recorded: bool,
    ) -> None:
        self._unit, self._rounding, self._grids = unit, rounding, grids
        self._settings, self._generator = settings, generator
        groups: list[dict[str, object]] = []
        if rounding:
            alpha = rounding[0].alpha.detach()
            self._weight, self._beta = alpha.new_full((), settings.weight), alpha.new_zeros(())
            groups.append({"params": [q.alpha for q in rounding], "lr": settings.rounding_lr})
        if grids:
            device = generator.device
            # What torch's kernel reads on a GPU; a CPU's reads a double.
            kind = torch.float64 if device.type == "cpu" else torch.float32
            self._rate = torch.zeros((), dtype=kind, device=device)
            groups.append({"params": _parameters(grids), "lr": self._rate})
        self._optimizer = torch.optim.Adam(groups, fused=True, capturable=recorded)

    def prepare(self, schedule: Schedule) -> bool:
        """Take the numbers of the next step; whether it has a rounding regularizer."""
        if self._grids:
            self._rate.fill_(schedule.scale_rate())
        temperature = schedule.temperature()
        if temperature is None or not self._rounding:
            return False
        self._beta.fill_(temperature)
        return True

    def __call__(self, regularized: bool, batch: Sequence[Tensor]) -> Tensor:
        """Learn from a batch as `_batch` makes it; its error, without gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        with product_precision(self._settings.precision, self._generator.device):
            error = _step_error(self._unit, batch, self._settings.drop_prob, self._generator)
            error.backward()  # type: ignore[no-untyped-call]
        if regularized:
            for quantizer in self._rounding:
                quantizer.add_regularizer_gradient_(self._weight, self._beta)
        self._optimizer.step()
        for grid in self._grids:
            grid.constrain_()
        return error.detach()


@torch.enable_grad()  # type: ignore[no-untyped-call]
def _optimize(
    name: str,
    unit: nn.Module,
    rounding: Sequence[AdaRoundQuantizer],
    grids: Sequence[Quantizer],
    data: UnitData,
    settings: Reconstruction,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]],
) -> list[float]:
    """Learn; returns the error at each step that was made."""
    schedule = Schedule(settings)
    recorder = graphs.recorder(generator) if settings.cuda_graphs else None
    step = _Step(unit, rounding, grids, settings, generator, recorder is not None)
    # Drawn at once: a draw a step would make a GPU wait for the host.
    chosen = torch.randint(
        len(data.targets),
        (settings.iters, settings.batch_size),
        generator=generator,
        device=generator.device,
    ).tolist()
    recent: list[Tensor] = []
    errors: list[float] = []
    with graphs.repeated(step, recorder) as run:
        batches = prefetched(functools.partial(_batch, data), chosen, generator.device)
        for number in progress(range(settings.iters)):
            recent.append(run(step.prepare(schedule), next(batches)))
            schedule.advance()
            if len(recent) == _LOOK_EVERY or schedule.ended:
                heard = _losses(name, recent, number)
                schedule.hear(math.fsum(heard) / len(heard), len(heard))
                errors += heard
                recent = []
            if schedule.ended:
                break
    return errors


def _losses(name: str, recent: Sequence[Tensor], step: int) -> list[float]:
    """The last losses: the one place where a GPU waits for the host.

    Raises:
        CalibrationError: one of them is not finite.
    """
    losses: list[float] = torch.stack(list(recent)).tolist()
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise CalibrationError(
                f"{name} diverged at step {step - len(losses) + 1 + index} (loss {loss}): "
                "lower recon.scale_lr or check the calibration data"
            )
    return losses


def _learned_grids(unit: nn.Module) -> list[Quantizer]:
    return [quantizer for _, quantizer in quantizers(unit) if quantizer.learned()]


def _parameters(grids: Sequence[Quantizer]) -> list[nn.Parameter]:
    return [parameter for quantizer in grids for parameter in quantizer.learned()]


@contextlib.contextmanager
def _with_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Only these parameters get gradients, and only within the `with` block."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = None


def _batch(data: UnitData, chosen: Sequence[int]) -> tuple[Tensor, ...]:
    """The chosen batches as one: inputs, as many inputs of the float model, and the target."""
    return (
        *_joined(data.inputs, chosen),
        *_joined(data.float_inputs, chosen),
        *_joined(data.targets, chosen),
    )


def _step_error(
    unit: nn.Module, batch: Sequence[Tensor], drop: float, generator: torch.Generator
) -> Tensor:
    """Output error of a batch as `_batch` makes it."""
    *inputs, target = batch
    half = len(inputs) // 2
    mixed = [
        _mix(quantized, exact, drop, generator)
        for quantized, exact in zip(inputs[:half], inputs[half:], strict=True)
    ]
    return output_error(unit(*mixed), target)


def _joined(batches: Sequence[tuple[Tensor, ...]], chosen: Sequence[int]) -> tuple[Tensor, ...]:
    """Several batches as one: pictures, windows or boxes are on axis 0 of all their tensors."""
    if len(chosen) == 1:
        return batches[chosen[0]]
    return tuple(map(torch.cat, zip(*(batches[index] for index in chosen), strict=True)))


def _mix(quantized: Tensor, exact: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Each element is the float model's with probability `drop` (QDrop, at a unit's input)."""
    if drop == 0:
        return quantized
    return keep_some_float(quantized, exact, drop, generator)
