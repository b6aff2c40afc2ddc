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

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.precision import product_precision
from ptq4sam.methods.prefetch import prefetched
from ptq4sam.operators.arithmetic import learning
from ptq4sam.quantization.dropping import keep_some_float
from ptq4sam.quantization.modes import dropping, quantizers
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Reconstruction

_log = logging.getLogger(__name__)

_LOOK_EVERY = 50
"""Steps between two looks at the loss."""
_LEAST_FALL = 1e-3
"""Relative fall of the mean loss that counts as one."""

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


class Schedule:
    """How far a reconstruction is, from 0 to 1, and what follows from it.

    Without patience it goes evenly over all steps. With patience, a loss that has not fallen for so
    many steps makes the rest of the schedule pass within as many steps, so that the rounding still
    hardens and the learning rate still falls to 0.
    """

    def __init__(self, settings: Reconstruction) -> None:
        self._settings = settings
        # Whole numbers: a sum of shares would reach the end of the warm-up a step late.
        self._origin, self._made, self._length = 0.0, 0, settings.iters
        self._least, self._since, self._hurrying = math.inf, 0, False

    @property
    def position(self) -> float:
        """0 at the first step, 1 after the last."""
        return self._origin + (1 - self._origin) * (self._made / self._length)

    @property
    def ended(self) -> bool:
        """Whether all steps were made."""
        return self._made == self._length

    def advance(self) -> None:
        """One step was made."""
        self._made += 1

    def hear(self, loss: float, steps: int) -> None:
        """Take into account the mean loss of the last `steps` steps."""
        patience = self._settings.patience
        if patience == 0 or self._hurrying:
            return
        if loss < self._least * (1 - _LEAST_FALL):
            self._least, self._since = loss, 0
            return
        self._since += steps
        if self._since >= patience:
            self._hurrying = True
            left = min(self._length - self._made, patience)
            self._origin, self._made, self._length = self.position, 0, left

    def temperature(self) -> float | None:
        """Exponent beta of AdaRound's regulariser; None during the warm-up."""
        start = self._settings.warm_up
        if self.position < start:
            return None
        high, low = self._settings.b_range
        done = (self.position - start) / (1 - start)
        return low + (high - low) * max(0.0, 1 - done)

    def scale_rate(self) -> float:
        """Learning rate of activation scales: a cosine from the first one to 0."""
        return self._settings.scale_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self.position)))


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
            if isinstance(quantizer, AdaRoundQuantizer):
                quantizer.begin_learning(weight)
                rounding.append(quantizer)
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
    groups: list[dict[str, object]] = []
    if rounding:
        groups.append({"params": [q.alpha for q in rounding], "lr": settings.rounding_lr})
    if grids:
        groups.append({"params": _parameters(grids), "lr": settings.scale_lr})
    optimizer = torch.optim.Adam(groups, fused=True)
    # Drawn at once: a draw a step would make a GPU wait for the host.
    chosen = torch.randint(
        len(data.targets),
        (settings.iters, settings.batch_size),
        generator=generator,
        device=generator.device,
    ).tolist()
    batches = prefetched(functools.partial(_batch, data), chosen, generator.device)
    recent: list[Tensor] = []
    errors: list[float] = []
    for step in progress(range(settings.iters)):
        if grids:
            optimizer.param_groups[-1]["lr"] = schedule.scale_rate()
        optimizer.zero_grad(set_to_none=True)
        with product_precision(settings.precision, generator.device):
            error = _step_error(unit, next(batches), settings.drop_prob, generator)
            error.backward()  # type: ignore[no-untyped-call]
        temperature = schedule.temperature()
        if temperature is not None:
            for quantizer in rounding:
                quantizer.add_regularizer_gradient_(settings.weight, temperature)
        optimizer.step()
        for grid in grids:
            grid.constrain_()
        schedule.advance()
        recent.append(error.detach())
        if len(recent) == _LOOK_EVERY or schedule.ended:
            heard = _losses(name, recent, step)
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
