"""The stated alternative of the reconstruction benchmark: a plain eager loop.

Straight from the papers (LSQ, AdaRound, QDrop, PTQ4SAM), one operation after the other, gradients
by autograd through detached roundings. It knows the framework's calibrated quantizers only to start
from their scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.operators.base import observe_weights
from ptq4sam.quantization.modes import WEIGHT_QUANTIZER, quantizers
from ptq4sam.quantization.recon import Reconstruction


def straight_through(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return (x.round() - x).detach() + x


class PlainActivation(nn.Module):
    """LSQ fake quantization, with QDrop while `drop` is set."""

    is_whole = False

    def __init__(self, scale: Tensor, zero_point: Tensor, levels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.zero_point, self.levels, self.drop = zero_point.clone(), levels, False

    def forward(self, x: Tensor, _value: Tensor | None = None) -> Tensor:
        """Quantize, element by element with probability 1/2."""
        factor = 1 / math.sqrt(x.numel() * (self.levels - 1))
        scale = (self.scale - self.scale * factor).detach() + self.scale * factor
        codes = straight_through(x / scale) + self.zero_point
        quantized = (torch.clamp(codes, 0, self.levels - 1) - self.zero_point) * scale
        return torch.where(torch.rand_like(x) < 0.5, quantized, x) if self.drop else quantized


class PlainSoftmax(nn.Module):
    """Log2 quantization of a softmax output with granularity tau, with QDrop."""

    is_whole = False

    def __init__(self, scale: Tensor, tau: Tensor, levels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.tau, self.levels, self.drop = tau.clone(), levels, False

    def forward(self, x: Tensor, _value: Tensor | None = None) -> Tensor:
        """Quantize, element by element with probability 1/2."""
        codes = straight_through(-torch.log2(x.clamp(min=1e-20) / self.scale) * self.tau)
        points = self.scale * 2 ** (-codes.clamp(0, self.levels - 1) / self.tau)
        quantized = torch.where(codes >= self.levels, torch.zeros_like(points), points)
        return torch.where(torch.rand_like(x) < 0.5, quantized, x) if self.drop else quantized


class PlainWeight(nn.Module):
    """AdaRound."""

    is_whole = False

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> None:
        super().__init__()
        shape = [-1] + [1] * (weight.dim() - 1)
        self.scale, self.zero_point = scale.reshape(shape), zero_point.reshape(shape)
        self.levels, self.soft = levels, True
        fraction = weight / self.scale - torch.floor(weight / self.scale)
        self.alpha = nn.Parameter(-torch.log(1.2 / (fraction + 0.1) - 1))

    def share(self) -> Tensor:
        """Rectified sigmoid of the rounding variables."""
        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Round by the variables."""
        up = self.share() if self.soft else (self.alpha >= 0).float()
        codes = torch.floor(weight / self.scale) + up + self.zero_point
        return (torch.clamp(codes, 0, self.levels - 1) - self.zero_point) * self.scale


def make_plain(unit: nn.Module) -> None:
    """Replace the calibrated quantizers of a unit by plain ones with the same scales."""
    for path, quantizer in list(quantizers(unit)):
        parent_path, _, name = path.rpartition(".")
        parent, levels = unit.get_submodule(parent_path), quantizer.grid.levels
        plain: nn.Module
        if isinstance(quantizer, AdaptiveGranularityQuantizer):
            plain = PlainSoftmax(quantizer.scale, quantizer.tau, levels)
        elif name == WEIGHT_QUANTIZER:
            weight = parent.weight
            plain = PlainWeight(weight, quantizer.scale, quantizer.zero_point, levels)
        else:
            plain = PlainActivation(quantizer.scale, quantizer.zero_point, levels)
        plain.mode = quantizer.mode
        setattr(parent, name, plain)


def calibrate_blindly(module: nn.Module) -> None:
    """Give every quantizer without a scale one, so that the module can be timed."""
    observe_weights(module)
    for _, quantizer in quantizers(module):
        if isinstance(quantizer, AdaptiveGranularityQuantizer):
            scale = quantizer.scale.detach()
            quantizer.merge((scale.new_full((3,), 0.5), scale.new_tensor([2.0, 1.0, 2.0])))
        elif not quantizer.is_calibrated:
            ends = quantizer.scale.detach().new_tensor([-3.0, 3.0])
            quantizer.merge((ends[0], ends[1]))


def reconstruct_plainly(
    unit: nn.Module,
    inputs: list[tuple[Tensor, ...]],
    exact_inputs: list[tuple[Tensor, ...]],
    targets: list[Tensor],
    settings: Reconstruction,
    steps: Iterator[int],
) -> float:
    """Learn; returns the mean output error afterwards with hard rounding."""
    weights = [module for module in unit.modules() if isinstance(module, PlainWeight)]
    activations = [m for m in unit.modules() if isinstance(m, PlainActivation | PlainSoftmax)]
    for_rounding = torch.optim.Adam([w.alpha for w in weights], lr=settings.rounding_lr)
    for_scales = torch.optim.Adam([a.scale for a in activations], lr=settings.scale_lr)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(for_scales, settings.iters)
    for activation in activations:
        activation.drop = True
    start = settings.warm_up * settings.iters
    for step in steps:
        index = int(torch.randint(len(targets), ()).item())
        mixed = [
            torch.where(torch.rand_like(quantized) < 0.5, quantized, exact)
            for quantized, exact in zip(inputs[index], exact_inputs[index], strict=True)
        ]
        error = (unit(*mixed) - targets[index]).pow(2).sum(1).mean()
        loss = error
        if step >= start:
            high, low = settings.b_range
            beta = low + (high - low) * (1 - (step - start) / (settings.iters - start))
            for weight in weights:
                loss = loss + settings.weight * (1 - (2 * weight.share() - 1).abs() ** beta).sum()
        for_rounding.zero_grad()
        for_scales.zero_grad()
        loss.backward()
        for_rounding.step()
        for_scales.step()
        annealing.step()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"step {step}: loss {loss.item()}")
    for activation in activations:
        activation.drop = False
    for weight in weights:
        weight.soft = False
    with torch.no_grad():
        errors = [
            float((unit(*args) - target).pow(2).sum(1).mean())
            for args, target in zip(inputs, targets, strict=True)
        ]
    return sum(errors) / len(errors)
