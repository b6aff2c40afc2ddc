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
from ptq4sam.quantization.modes import dropping, quantizers
from ptq4sam.quantization.quantizers import LSQQuantizer, Quantizer
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Reconstruction

_log = logging.getLogger(__name__)

LearnedScale = LSQQuantizer | AdaptiveGranularityQuantizer


@dataclass(frozen=True)
class UnitData:
    """What a unit saw and should give, one entry a calibration picture.

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
    """Output error of a unit over all pictures, everything quantized.

    Attributes:
        before: rounded to nearest.
        after: as it was left.
        steps: how many were made.
        fell_back: learning made it worse, and it was left rounded to nearest.
    """

    before: float
    after: float
    steps: int = 0
    fell_back: bool = False


def output_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over axis 1, averaged over the others (QDrop's objective)."""
    return (output - target).pow(2).sum(dim=1).mean()


def rounding_temperature(settings: Reconstruction, step: int) -> float | None:
    """Exponent beta of AdaRound's regulariser at a step; None during the warm-up."""
    start = settings.warm_up * settings.iters
    if step < start:
        return None
    high, low = settings.b_range
    done = (step - start) / max(1.0, settings.iters - start)
    return low + (high - low) * max(0.0, 1 - done)


def mean_error(name: str, unit: nn.Module, data: UnitData) -> float:
    """Mean output error of the unit as it is, over all pictures.

    Raises:
        CalibrationError: that of a picture is not finite.
    """
    with torch.no_grad():
        errors = [
            float(output_error(unit(*inputs), target))
            for inputs, (target,) in zip(data.inputs, data.targets, strict=True)
        ]
    for index, error in enumerate(errors):
        if not math.isfinite(error):
            raise CalibrationError(
                f"{name} gives values that are not finite on calibration picture {index}: check "
                "the weights and that picture"
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
) -> UnitLosses:
    """Learn a unit's rounding and activation scales, and leave it rounded hard.

    A unit that learning made worse goes back to rounding to nearest, with a warning.

    Args:
        name: of the unit, for messages.
        unit: module whose quantizers are calibrated.
        weights: each weight of the unit with its quantizer.
        data: captured inputs and targets.
        settings: the scheme's `recon` section.
        generator: source of every random choice.
        progress: wraps the range of steps to show how far it is.

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
        if alphas or scales:
            _optimize(name, unit, rounding, scales, data, settings, generator, progress)
    for quantizer in rounding:
        quantizer.finish_learning()
    after = mean_error(name, unit, data)
    if after <= before:
        return UnitLosses(before, after, settings.iters)
    _log.warning(
        "%s became worse by learning (error %.4g, %.4g before): it is left rounded to nearest; "
        "more steps (recon.iters) or a lower recon.scale_lr may help",
        name,
        after,
        before,
    )
    unit.load_state_dict(start)
    return UnitLosses(before, before, settings.iters, fell_back=True)


def _optimize(
    name: str,
    unit: nn.Module,
    rounding: Sequence[AdaRoundQuantizer],
    scales: Sequence[LearnedScale],
    data: UnitData,
    settings: Reconstruction,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]],
) -> None:
    optimizers: list[torch.optim.Optimizer] = []
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    if rounding:
        alphas = [quantizer.alpha for quantizer in rounding]
        optimizers.append(torch.optim.Adam(alphas, lr=settings.rounding_lr))
    if scales:
        optimizers.append(torch.optim.Adam([q.scale for q in scales], lr=settings.scale_lr))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], settings.iters)
    for step in progress(range(settings.iters)):
        loss = _step_loss(unit, rounding, data, settings, step, generator)
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"{name} diverged at step {step} (loss {float(loss.detach())}): "
                "lower recon.scale_lr or check the calibration data"
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        for quantizer in scales:
            quantizer.clamp_scale_()
        if schedule is not None:
            schedule.step()


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


def _step_loss(
    unit: nn.Module,
    rounding: Sequence[AdaRoundQuantizer],
    data: UnitData,
    settings: Reconstruction,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """Output error of one random picture plus the rounding regulariser."""
    index = int(torch.randint(len(data.targets), (), generator=generator, device=generator.device))
    inputs = tuple(
        _mix(quantized, exact, settings.drop_prob, generator)
        for quantized, exact in zip(data.inputs[index], data.float_inputs[index], strict=True)
    )
    (target,) = data.targets[index]
    loss = output_error(unit(*inputs), target)
    beta = rounding_temperature(settings, step)
    if beta is not None:
        for quantizer in rounding:
            loss = loss + settings.weight * quantizer.rounding_regularizer(beta)
    return loss


def _mix(quantized: Tensor, exact: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Each element is the float model's with probability `drop` (QDrop, at a unit's input)."""
    if drop == 0:
        return quantized
    random = torch.rand(quantized.shape, generator=generator, device=generator.device)
    return torch.where(random.to(quantized.device) < drop, exact, quantized)
