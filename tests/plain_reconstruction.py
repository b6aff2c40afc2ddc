"""Reconstruction of a unit written once more, in plain torch, to compare the package's with.

From the papers (BRECQ, QDrop, AdaRound, LSQ) and the description of the published settings, not
from ptq4sam, of which nothing is imported: autograd takes every gradient, torch's own schedulers
the rates. What it shares with the package is the order of random draws from one generator, which
`reconstruct` documents, so that both drop the same elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[["Quantized", tuple[Tensor, ...]], Tensor]
"""A unit's output from its arguments, with weights and activations that pass a `Quantized`."""


@dataclass
class Settings:
    """Of a reconstruction; defaults are the published ones."""

    steps: int = 20_000
    rounding_rate: float = 1e-3
    scale_rate: float = 4e-5
    warm_up: float = 0.2
    weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    keep_float: float = 0.5


@dataclass
class Data:
    """A unit's arguments in both models and the float model's answer, one entry a picture."""

    quantized: Sequence[tuple[Tensor, ...]]
    exact: Sequence[tuple[Tensor, ...]]
    targets: Sequence[Tensor]


@dataclass
class Outcome:
    """What was learned, and the output error at each step and at the end."""

    alphas: dict[str, Tensor]
    scales: dict[str, Tensor]
    zero_points: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    after: float = 0.0


def straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of x."""
    return x + (x.round() - x).detach()


def keep(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Which elements stay float, each with probability one half.

    A random word has 32 bits, a zero keeps: word i serves elements i, i + n/32, i + 2 n/32, ... of
    n where 32 divides n, else element i alone.
    """
    count = math.prod(shape)
    rows = 32 if count % 32 == 0 else 1
    words = count // rows
    drawn = torch.empty((words + 1) // 2, dtype=torch.int64)
    drawn.random_(-(2**63), None, generator=generator)
    bits = drawn.view(torch.int32)[:words] >> torch.arange(rows, dtype=torch.int32)[:, None]
    return (bits & 1 == 0).reshape(shape)


class Quantized:
    """A unit's tensors by name, as the package's state dict has them, and what is learned of them.

    Args:
        state: weights, biases and what calibration made of their quantizers.
        bits: of weights and activations.
        learn_zero_points: those of activations too (LSQ+).
    """

    def __init__(self, state: dict[str, Tensor], bits: int, learn_zero_points: bool = False):
        self.state = {name: value.detach().clone() for name, value in state.items()}
        self.top = 2**bits - 1
        self.alphas: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.zero_points: dict[str, Tensor] = {}
        self.generator: torch.Generator | None = None
        self.hard = False
        self.sizes: dict[str, int] = {}
        for name in self.state:
            owner = name.removesuffix(".scale")
            if owner == name:
                continue
            if owner.endswith("weight_quantizer"):
                layer = owner.removesuffix(".weight_quantizer")
                self.alphas[layer] = self._first_alpha(layer).requires_grad_()
            else:
                self.scales[owner] = self.state[name].requires_grad_()
                if learn_zero_points:
                    self.zero_points[owner] = self.state[f"{owner}.zero_point"].requires_grad_()

    def _grid(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.state[f"{layer}.weight"]
        shape = [-1] + [1] * (weight.dim() - 1)
        scale = self.state[f"{layer}.weight_quantizer.scale"].reshape(shape)
        return weight, scale, self.state[f"{layer}.weight_quantizer.zero_point"].reshape(shape)

    def _first_alpha(self, layer: str) -> Tensor:
        weight, scale, _ = self._grid(layer)
        share = weight / scale - (weight / scale).floor()
        return -(1.2 / (share + 0.1) - 1).log()

    def up(self, layer: str) -> Tensor:
        """How far each weight is rounded up: h(alpha)."""
        alpha = self.alphas[layer]
        if self.hard:
            return (alpha >= 0).float()
        return (1.2 * alpha.sigmoid() - 0.1).clamp(0, 1)

    def weight(self, layer: str) -> Tensor:
        """AdaRound's weight."""
        weight, scale, zero = self._grid(layer)
        codes = (weight / scale).floor() + self.up(layer) + zero
        return (codes.clamp(0, self.top) - zero) * scale

    def activation(self, name: str, x: Tensor) -> Tensor:
        """QDrop: on the grid, or float as drawn."""
        quantized = self._granular(name, x) if f"{name}.tau" in self.state else self._even(name, x)
        if self.generator is None:
            return quantized
        return torch.where(keep(x.shape, self.generator), x, quantized)

    def _even(self, name: str, x: Tensor) -> Tensor:
        self.sizes[name] = x.numel()
        scale = self.scales[name]
        zero = self.state[f"{name}.zero_point"]
        if name in self.zero_points:
            zero = straight_through(zero)
        codes = (straight_through(x / scale) + zero).clamp(0, self.top)
        return (codes - zero) * scale

    def _granular(self, name: str, x: Tensor) -> Tensor:
        scale, tau = self.scales[name], self.state[f"{name}.tau"]
        code = straight_through(-tau * (x.clamp(min=1e-20) / scale).log2())
        points = scale * torch.exp2(-code.clamp(0, self.top) / tau)
        return torch.where(code > self.top, torch.zeros_like(points), points)

    def linear(self, layer: str, x: Tensor) -> Tensor:
        """A linear layer on its quantized input and weight."""
        x = self.activation(f"{layer}.input_quantizer", x)
        return F.linear(x, self.weight(layer), self.state[f"{layer}.bias"])

    def after_backward(self) -> None:
        """LSQ's factor; the scale of an adaptive granularity has none."""
        for learned in (self.scales, self.zero_points):
            for name, parameter in learned.items():
                if name in self.sizes and parameter.grad is not None:
                    parameter.grad *= 1 / math.sqrt(self.sizes[name] * self.top)

    @torch.no_grad()
    def after_step(self) -> None:
        """Scales stay positive, zero points among the codes."""
        for scale in self.scales.values():
            scale.copy_(scale.abs().clamp(min=torch.finfo(torch.float32).eps))
        for zero in self.zero_points.values():
            zero.clamp_(0, self.top)

    @torch.no_grad()
    def harden(self) -> None:
        """Up where alpha >= 0; zero points whole."""
        self.hard, self.generator = True, None
        for zero in self.zero_points.values():
            zero.copy_(zero.round())


def reconstruct(
    unit: Quantized,
    forward: Forward,
    data: Data,
    settings: Settings,
    generator: torch.Generator,
) -> Outcome:
    """Learn a unit.

    Draws: which picture each step takes, all at once; then, step by step, which elements of each
    argument stay the float model's, argument by argument, and which of each activation stay float,
    in the order in which the activations come.
    """
    optimizer = torch.optim.Adam(list(unit.alphas.values()), lr=settings.rounding_rate)
    of_scales = torch.optim.Adam(
        [*unit.scales.values(), *unit.zero_points.values()], lr=settings.scale_rate
    )
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(of_scales, settings.steps)
    pictures = torch.randint(len(data.targets), (settings.steps, 1), generator=generator)
    losses = []
    for step, picture in enumerate(pictures.flatten().tolist()):
        arguments = tuple(
            torch.where(keep(exact.shape, generator), exact, quantized)
            if settings.keep_float
            else quantized
            for quantized, exact in zip(data.quantized[picture], data.exact[picture], strict=True)
        )
        unit.generator = generator if settings.keep_float else None
        loss = output_error(forward(unit, arguments), data.targets[picture])
        losses.append(float(loss.detach()))
        beta = temperature(step, settings)
        if beta is not None:
            shares = torch.cat([unit.up(layer).flatten() for layer in unit.alphas])
            loss = loss + settings.weight * (1 - (2 * shares - 1).abs() ** beta).sum()
        optimizer.zero_grad()
        of_scales.zero_grad()
        loss.backward()
        unit.after_backward()
        optimizer.step()
        of_scales.step()
        annealing.step()
        unit.after_step()
    unit.harden()
    with torch.no_grad():
        after = [
            float(output_error(forward(unit, arguments), target))
            for arguments, target in zip(data.quantized, data.targets, strict=True)
        ]
    return Outcome(unit.alphas, unit.scales, unit.zero_points, losses, sum(after) / len(after))


def output_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over axis 1, mean over the others."""
    return (output - target).square().sum(dim=1).mean()


def temperature(step: int, settings: Settings) -> float | None:
    """The regulariser's exponent: none in the first share of the steps, then falling evenly."""
    start = settings.warm_up * settings.steps
    if step < start:
        return None
    high, low = settings.beta
    return low + (high - low) * (1 - (step - start) / (settings.steps - start))


def mlp(unit: Quantized, arguments: tuple[Tensor, ...]) -> Tensor:
    """The image encoder's MLP."""
    return unit.linear("lin2", F.gelu(unit.linear("lin1", arguments[0])))


def encoder_attention(heads: int) -> Forward:
    """The image encoder's attention, [windows, rows, columns, dim], with relative positions."""

    def forward(unit: Quantized, arguments: tuple[Tensor, ...]) -> Tensor:
        (x,) = arguments
        windows, rows, columns, dim = x.shape
        qkv = unit.linear("qkv", x).reshape(windows, rows * columns, 3, heads, dim // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query = unit.activation("core.query_quantizer", query)
        key = unit.activation("core.key_quantizer", key)
        value = unit.activation("core.value_quantizer", value)
        logits = (query * (dim // heads) ** -0.5) @ key.transpose(-1, -2)
        grid = query.reshape(windows, heads, rows, columns, -1)
        down = torch.einsum("whrcd,rkd->whrck", grid, _table(unit.state["rel_pos_h"], rows))
        across = torch.einsum("whrcd,ckd->whrck", grid, _table(unit.state["rel_pos_w"], columns))
        positions = down[..., :, None] + across[..., None, :]
        logits = logits + positions.reshape(logits.shape)
        attention = unit.activation("core.softmax_quantizer", logits.softmax(-1))
        attended = (attention @ value).transpose(1, 2).reshape(windows, rows, columns, dim)
        return unit.linear("proj", attended)

    return forward


def _table(table: Tensor, size: int) -> Tensor:
    place = torch.arange(size)
    return table[place[:, None] - place + size - 1]


def decoder_attention(heads: int) -> Forward:
    """The mask decoder's attention from q to k and v, [boxes, tokens, dim] each."""

    def forward(unit: Quantized, arguments: tuple[Tensor, ...]) -> Tensor:
        names = ("q_proj", "k_proj", "v_proj")
        projected = [unit.linear(name, x) for name, x in zip(names, arguments, strict=True)]
        query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in projected)
        query = unit.activation("core.query_quantizer", query)
        key = unit.activation("core.key_quantizer", key)
        value = unit.activation("core.value_quantizer", value)
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        attention = unit.activation("core.softmax_quantizer", logits.softmax(-1))
        return unit.linear("out_proj", (attention @ value).transpose(1, 2).flatten(2))

    return forward
