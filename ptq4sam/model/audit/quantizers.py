"""A model's quantizers compared with its scheme, and its weights with their grids."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ptq4sam.methods.assignment import make_quantizer
from ptq4sam.model.audit.modules import slot_of
from ptq4sam.model.audit.report import Finding
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import QuantizedLayer, quantized_layers
from ptq4sam.quantization.affine import AffineQuantizer
from ptq4sam.quantization.grid import along_channels
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.quantization.scheme import Scheme


def unusable_parameters(sam: QuantizedSam) -> Iterator[Finding]:
    """Scales, zero points and granularities that no grid has."""
    for name, quantizer in quantizers(sam):
        yield from (Finding(name, problem) for problem in quantizer.problems())


def other_than_the_scheme(sam: QuantizedSam) -> Iterator[Finding]:
    """Quantizers that are not what the scheme says; none may be in a unit that is kept float."""
    shapes = {id(q.weight_quantizer): q.weight.shape for _, q in quantized_layers(sam)}
    wanted_of = functools.cache(functools.partial(_wanted, sam.scheme))
    for name, quantizer in quantizers(sam):
        said = wanted_of(sam.level_of(name), *slot_of(name, sam))
        if said is None:
            yield Finding(name, f"has {quantizer.grid.bits} bits where the scheme says float")
            continue
        for problem in quantizer.unlike(said):
            yield Finding(name, f"{problem[0]} where the scheme says {problem[1]}")
        affine, wanted = quantizer.as_affine(), said.as_affine()
        if affine is not None and wanted is not None:
            shape = shapes.get(id(quantizer))
            yield from (Finding(name, problem) for problem in _other_shape(affine, wanted, shape))


def _wanted(
    scheme: Scheme, level: int | str | None, slot: str, roles: frozenset[str]
) -> Quantizer | None:
    """What the scheme says of slots of a level and of some roles; None where they stay float."""
    own = scheme.at_level(level)
    return None if own is None else make_quantizer(own, slot, roles)


def _other_shape(
    quantizer: AffineQuantizer, said: AffineQuantizer, weight: torch.Size | None
) -> Iterator[str]:
    """Scales and zero points for other channels, groups or heads than there are.

    Args:
        quantizer: one of the model.
        said: what the scheme says.
        weight: the shape of what it quantizes; None of an activation.
    """
    if weight is not None:
        wanted = said.parameter_shape(weight)
        of_groups = f" and {wanted[1]} groups" if len(wanted) > 1 else ""
        told = f"one for each of {wanted[0]} channels{of_groups}" if wanted else "one"
    elif said.channel_axis is None:
        wanted, told = (), "one"
    else:
        # As many as came when it was calibrated; others are refused by a forward pass.
        wanted, told = (quantizer.scale.numel(),), "one for each head"
    for parameter in ("scale", "zero_point"):
        shape = tuple(getattr(quantizer, parameter).shape)
        if quantizer.is_calibrated and shape != wanted:
            yield f"has a {parameter} of shape {list(shape)} where the scheme says {told}"


def switched_or_dropping(sam: QuantizedSam) -> Iterator[Finding]:
    """Quantizers that do not quantize all that passes them."""
    for name, quantizer in quantizers(sam):
        if quantizer.mode is not Mode.QUANTIZE:
            problem = f"is switched to {quantizer.mode.name.lower()}, expected to quantize"
            yield Finding(name, problem)
        if quantizer.drop_probability > 0:
            probability = quantizer.drop_probability
            problem = f"drops quantization with probability {probability}, expected 0"
            yield Finding(name, problem)


def weights_off_grid(sam: QuantizedSam) -> Iterator[Finding]:
    """Layers whose weights, as a file holds them, do not lie on their grids."""
    for name, layer in quantized_layers(sam):
        if layer.weight_quantizer.is_calibrated:
            on_grid = _on_grid(layer)
            if not bool(on_grid.all()):
                share = 1 - float(on_grid.float().mean())
                yield Finding(name, f"{share:.1%} of its weight is off the grid, expected none")


def _on_grid(layer: QuantizedLayer) -> Tensor:
    quantizer, weight = layer.weight_quantizer, layer.weight
    used: Tensor = quantizer(weight)
    scale, zero_point = (
        along_channels(parameter, weight.shape, 0)
        for parameter in (quantizer.scale, quantizer.zero_point)
    )
    code = torch.round(used / scale) + zero_point
    low, high = quantizer.grid.qmin, quantizer.grid.qmax
    on_grid: Tensor = (code >= low) & (code <= high) & ((code - zero_point) * scale == used)
    # What a file holds must be what is computed: a frozen weight is on its grid itself.
    on_grid &= weight == used
    return on_grid
