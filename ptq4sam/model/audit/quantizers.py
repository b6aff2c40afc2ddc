"""A model's quantizers compared with its scheme, and its weights with their grids."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.audit.modules import DECODER, exception
from ptq4sam.model.audit.report import Finding
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import QuantizedLayer, quantized_layers, weight_quantizers
from ptq4sam.quantization.grid import along_channels
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import QUANTIZERS, AffineQuantizer, Mode, Quantizer
from ptq4sam.quantization.scheme import Scheme, TensorFormat, bits_of_level


def unusable_parameters(sam: QuantizedSam) -> Iterator[Finding]:
    """Scales, zero points and granularities that no grid has."""
    for name, quantizer in quantizers(sam):
        for problem in _parameter_problems(quantizer, sam.scheme):
            yield Finding(name, problem)


def _parameter_problems(quantizer: Quantizer, scheme: Scheme) -> Iterator[str]:
    if not quantizer.is_calibrated:
        yield "has no scale, expected one from calibration or a file"
        return
    scale = quantizer.scale.detach()
    bad = scale[~(torch.isfinite(scale) & (scale > 0))]
    if bad.numel():
        yield f"has a scale of {float(bad[0]):.4g}, expected one above 0"
    elif isinstance(quantizer, AdaptiveGranularityQuantizer):
        tau, taus = float(quantizer.tau), scheme.ptq4sam.taus
        if tau not in taus:
            yield f"has the granularity {tau:g}, expected one of {', '.join(map(str, taus))}"
    elif isinstance(quantizer, AffineQuantizer):
        low, high = (0, 0) if quantizer.grid.symmetric else _ends(quantizer)
        zero_point = quantizer.parameters_in_use()[1]
        usable = (zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)
        bad = zero_point[~usable]
        if bad.numel():
            said = "0" if quantizer.grid.symmetric else f"a whole number from {low} to {high}"
            yield f"has the zero point {float(bad[0]):.6g}, expected {said}"


def _ends(quantizer: Quantizer) -> tuple[int, int]:
    return quantizer.grid.qmin, quantizer.grid.qmax


def other_than_the_scheme(sam: QuantizedSam) -> Iterator[Finding]:
    """Quantizers that are not what the scheme says; none may be in a unit that is kept float."""
    weights = {id(quantizer) for quantizer in weight_quantizers(sam)}
    channels = {id(q.weight_quantizer): len(q.weight) for _, q in quantized_layers(sam)}
    for name, quantizer in quantizers(sam):
        is_weight = id(quantizer) in weights
        said = _bits(name, sam.scheme, is_weight)
        if quantizer.grid.bits != said:
            told = "float" if said is None else f"{said} bits"
            yield Finding(name, f"has {quantizer.grid.bits} bits where the scheme says {told}")
        if said is None:
            continue
        tensor_format = sam.scheme.w_qconfig if is_weight else sam.scheme.a_qconfig
        if _is_adaptive(name, sam.scheme):
            problems = _not_adaptive(quantizer)
        else:
            problems = _other_format(quantizer, tensor_format, channels.get(id(quantizer)))
        yield from (Finding(name, problem) for problem in problems)


def _bits(name: str, scheme: Scheme, is_weight: bool) -> int | None:
    """Bits that the scheme says for a quantizer; None where nothing is to be quantized."""
    level = exception(name, scheme)
    if level is None:
        return scheme.w_qconfig.bit if is_weight else scheme.a_qconfig.bit
    both = bits_of_level(level)
    return None if both is None else both[0 if is_weight else 1]


def _is_adaptive(name: str, scheme: Scheme) -> bool:
    adaptive = scheme.ptq4sam.AGQ
    where = adaptive is True or (adaptive == "decoder" and name.startswith(f"{DECODER}."))
    return where and name.endswith(".softmax_quantizer")


def _not_adaptive(quantizer: Quantizer) -> Iterator[str]:
    if not isinstance(quantizer, AdaptiveGranularityQuantizer):
        yield "is evenly spaced where the scheme says adaptive granularity"


def _other_format(quantizer: Quantizer, said: TensorFormat, channels: int | None) -> Iterator[str]:
    """Differences of an evenly spaced grid.

    Args:
        quantizer: its quantizer.
        said: what the scheme says.
        channels: of a weight; None for an activation.
    """
    if isinstance(quantizer, AdaptiveGranularityQuantizer):
        yield "has adaptive granularity where the scheme says evenly spaced"
        return
    kind = QUANTIZERS[said.quantizer]
    if type(quantizer) is not kind:
        yield f"is of {type(quantizer).__name__} where the scheme says {kind.__name__}"
    if quantizer.grid.symmetric != said.symmetric:
        found, wanted = (
            "symmetric" if symmetric else "asymmetric"
            for symmetric in (quantizer.grid.symmetric, said.symmetric)
        )
        yield f"is {found} where the scheme says {wanted}"
    wanted_shape = [] if said.ch_axis < 0 else [channels]
    for parameter in ("scale", "zero_point"):
        shape = list(getattr(quantizer, parameter).shape)
        if quantizer.is_calibrated and shape != wanted_shape:
            told = "one" if said.ch_axis < 0 else f"one for each of {channels} channels"
            yield f"has a {parameter} of shape {shape} where the scheme says {told}"


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
        along_channels(parameter, weight.dim(), 0)
        for parameter in (quantizer.scale, quantizer.zero_point)
    )
    code = torch.round(used / scale) + zero_point
    low, high = _ends(quantizer)
    on_grid: Tensor = (code >= low) & (code <= high) & ((code - zero_point) * scale == used)
    # What a file holds must be what is computed: a frozen weight is on its grid itself.
    on_grid &= weight == used
    return on_grid
