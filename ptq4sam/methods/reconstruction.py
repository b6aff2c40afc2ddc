"""Reconstruction of one unit: learn rounding and activation scales so that outputs come back.

BRECQ's block-wise objective (Li et al., 2021) with QDrop's random dropping of quantization (Wei et
al., 2022) and AdaRound's rounding (Nagel et al., 2020). It works on tensors: whoever calls it
captures the inputs and targets.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.precision import product_precision
from ptq4sam.quantization.dropping import keep_some_float
from ptq4sam.quantization.modes import dropping, quantizers
from ptq4sam.quantization.quantizers import LSQQuantizer, Quantizer
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Reconstruction

_log = logging.getLogger(__name__)

_LOOK_EVERY = 50
"""Steps between two looks at the loss."""
_LEAST_FALL = 1e-3
"""Relative fall of the mean loss that counts as one."""

CURVE_POINTS = 200
"""Most values that are kept of a unit's errors."""

LearnedScale = LSQQuantizer | AdaptiveGranularityQuantizer


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

    Attributes:
        position: 0 at the first step, 1 after the last.
    """

    def __init__(self, settings: Reconstruction) -> None:
        self._settings = settings
        self.position = 0.0
        self._pace = 1 / settings.iters
        self._least, self._since, self._hurrying = math.inf, 0, False

    @property
    def ended(self) -> bool:
        """Whether all steps were made (but for the rounding of a sum of paces)."""
        return self.position > 1 - self._pace / 2

    def advance(self) -> None:
        """One step was made."""
        self.position += self._pace

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
            self._pace = max(self._pace, (1 - self.position) / patience)

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
        generator: source of every random choice.
        progress: wraps the range of steps to show how far it is.
        fall_back: put a unit that learning made worse back to rounding to nearest, with a warning.

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
    scales = _learned_scales(unit) if settings.learn_scale else []
    alphas = [quantizer.alpha for quantizer in rounding]
    with (
        dropping(unit, settings.drop_prob, generator),
        _learning([*alphas, *(quantizer.scale for quantizer in scales)]),
    ):
        errors: list[float] = []
        if alphas or scales:
            errors = _optimize(name, unit, rounding, scales, data, settings, generator, progress)
    for quantizer in rounding:
        quantizer.finish_learning()
    after = mean_error(name, unit, data)
    if after <= before or not fall_back:
        return UnitLosses(before, after, len(errors), curve=_curve(errors))
    _log.warning(
        "%s became worse by learning (error %.4g, %.4g before): it is left rounded to nearest; "
        "more steps (recon.iters) or a lower recon.scale_lr may help",
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


def _optimize(
    name: str,
    unit: nn.Module,
    rounding: Sequence[AdaRoundQuantizer],
    scales: Sequence[LearnedScale],
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
    if scales:
        groups.append({"params": [q.scale for q in scales], "lr": settings.scale_lr})
    optimizer = torch.optim.Adam(groups, fused=True)
    # Drawn at once: a draw a step would make a GPU wait for the host.
    chosen = torch.randint(
        len(data.targets),
        (settings.iters, settings.batch_size),
        generator=generator,
        device=generator.device,
    ).tolist()
    recent: list[Tensor] = []
    errors: list[float] = []
    for step in progress(range(settings.iters)):
        if scales:
            optimizer.param_groups[-1]["lr"] = schedule.scale_rate()
        optimizer.zero_grad(set_to_none=True)
        with product_precision(settings.precision, generator.device):
            error = _step_error(unit, data, chosen[step], settings.drop_prob, generator)
            error.backward()  # type: ignore[no-untyped-call]
        temperature = schedule.temperature()
        if temperature is not None:
            for quantizer in rounding:
                quantizer.add_regularizer_gradient_(settings.weight, temperature)
        optimizer.step()
        for scale in scales:
            scale.clamp_scale_()
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


def _learned_scales(unit: nn.Module) -> list[LearnedScale]:
    return [quantizer for _, quantizer in quantizers(unit) if isinstance(quantizer, LearnedScale)]


@contextlib.contextmanager
def _learning(parameters: Sequence[Tensor]) -> Iterator[None]:
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


def _step_error(
    unit: nn.Module,
    data: UnitData,
    chosen: Sequence[int],
    drop: float,
    generator: torch.Generator,
) -> Tensor:
    """Output error of the chosen batches together."""
    inputs = tuple(
        _mix(quantized, exact, drop, generator)
        for quantized, exact in zip(
            _joined(data.inputs, chosen), _joined(data.float_inputs, chosen), strict=True
        )
    )
    (target,) = _joined(data.targets, chosen)
    return output_error(unit(*inputs), target)


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
