"""Quantizers that no grid or no scheme has, put into a model that passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import FixedQuantizer, LSQQuantizer, Quantizer

MLP = "image_encoder.blocks.0.mlp.lin1"
WINDOW = "image_encoder.blocks.0.attn"
GLOBAL = "image_encoder.blocks.1.attn"
FINAL = "mask_decoder.transformer.final_attn_token_to_image"
SELF = "mask_decoder.transformer.layers.0.self_attn"


def quantizer_of(sam: QuantizedSam, path: str) -> Quantizer:
    return cast(Quantizer, sam.get_submodule(path))


AFFINE = [
    f"{MLP}.input_quantizer",
    "image_encoder.neck.2.input_quantizer",
    f"{WINDOW}.core.query_quantizer",
    f"{GLOBAL}.core.key_quantizer",
    f"{FINAL}.core.value_quantizer",
    f"{SELF}.q_proj.input_quantizer",
]
SOFTMAX = [
    f"{WINDOW}.core.softmax_quantizer",
    f"{GLOBAL}.core.softmax_quantizer",
    f"{FINAL}.core.softmax_quantizer",
]


@pytest.mark.parametrize(
    ("path", "scale"),
    [
        *((path, 0.0) for path in (*AFFINE, *SOFTMAX, f"{MLP}.weight_quantizer")),
        *((f"{MLP}.input_quantizer", scale) for scale in (-1.0, float("nan"), float("inf"))),
    ],
)
def test_a_scale_that_no_grid_has(
    quantized: QuantizedSam, told: Callable[[], list[str]], path: str, scale: float
) -> None:
    quantizer_of(quantized, path).scale.data.fill_(scale)
    assert told() == [f"{path}: has a scale of {scale:.4g}, expected one above 0"]


@pytest.mark.parametrize("path", [*AFFINE, *SOFTMAX])
@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_a_scale_a_thousand_times_off(
    quantized: QuantizedSam, told: Callable[[], list[str]], path: str, factor: float
) -> None:
    quantizer_of(quantized, path).scale.data.mul_(factor)
    assert [line for line in told() if line.startswith(f"{path}: covers ")]


@pytest.mark.parametrize("zero_point", [-1.0, 16.0, 300.0, 2.5])
def test_a_zero_point_that_is_no_code(
    quantized: QuantizedSam, told: Callable[[], list[str]], zero_point: float
) -> None:
    path = f"{MLP}.input_quantizer"
    quantizer_of(quantized, path).zero_point.fill_(zero_point)
    wanted = "expected a whole number from 0 to 15"
    assert told() == [f"{path}: has the zero point {zero_point:g}, {wanted}"]


@pytest.mark.parametrize("tau", [3.0, 0.0, 8.0, 2.5])
def test_a_granularity_that_there_is_not(
    quantized: QuantizedSam, told: Callable[[], list[str]], tau: float
) -> None:
    path = f"{GLOBAL}.core.softmax_quantizer"
    cast(AdaptiveGranularityQuantizer, quantizer_of(quantized, path)).tau.fill_(tau)
    assert f"{path}: has the granularity {tau:g}, expected one of 1, 2, 4" in told()


def test_a_granularity_that_the_scheme_does_not_allow(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    path = f"{FINAL}.core.softmax_quantizer"
    tau = int(cast(AdaptiveGranularityQuantizer, quantizer_of(quantized, path)).tau)
    others = tuple(other for other in (1, 2, 4) if other != tau)
    methods = replace(quantized.scheme.ptq4sam, taus=others)
    quantized.scheme = replace(quantized.scheme, ptq4sam=methods)
    expected = f"where the scheme says one of {others[0]}, {others[1]}"
    assert f"{path}: has the granularity {tau} {expected}" in told()


def test_a_quantizer_without_a_scale(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    quantized.image_encoder.neck[0].input_quantizer = LSQQuantizer(Grid(4))
    wanted = "expected one from calibration or a file"
    assert told() == [f"image_encoder.neck.0.input_quantizer: has no scale, {wanted}"]


def calibrated(kind: type[FixedQuantizer] | type[LSQQuantizer], grid: Grid) -> Quantizer:
    quantizer = kind(grid)
    quantizer.observe(torch.linspace(-3, 3, 100), None)
    return quantizer


@pytest.mark.parametrize(
    ("path", "quantizer", "problem"),
    [
        (
            f"{MLP}.input_quantizer",
            (LSQQuantizer, Grid(5)),
            "has 5 bits where the scheme says 4 bits",
        ),
        (
            f"{FINAL}.core.key_quantizer",
            (LSQQuantizer, Grid(4, symmetric=True)),
            "is symmetric where the scheme says asymmetric",
        ),
        (
            f"{FINAL}.core.key_quantizer",
            (FixedQuantizer, Grid(4)),
            "is of FixedQuantizer where the scheme says LSQQuantizer",
        ),
        (
            f"{WINDOW}.core.softmax_quantizer",
            (LSQQuantizer, Grid(4)),
            "is of LSQQuantizer where the scheme says AdaptiveGranularityQuantizer",
        ),
    ],
)
def test_a_grid_that_is_not_the_schemes(
    quantized: QuantizedSam,
    told: Callable[[], list[str]],
    path: str,
    quantizer: tuple[type[LSQQuantizer], Grid],
    problem: str,
) -> None:
    owner, _, name = path.rpartition(".")
    setattr(quantized.get_submodule(owner), name, calibrated(*quantizer))
    assert f"{path}: {problem}" in told()


def test_other_channels_than_the_schemes(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    quantizer = cast(QuantizedLinear, quantized.get_submodule(MLP)).weight_quantizer
    quantizer.scale = quantizer.scale.max()
    quantizer.zero_point = quantizer.zero_point[0]
    wanted = "where the scheme says one for each of 128 channels"
    assert f"{MLP}.weight_quantizer: has a scale of shape [] {wanted}" in told()
    quantized.scheme = replace(
        quantized.scheme, w_qconfig=replace(quantized.scheme.w_qconfig, ch_axis=-1)
    )
    other = "image_encoder.blocks.0.mlp.lin2.weight_quantizer"
    assert f"{other}: has a scale of shape [32] where the scheme says one" in told()
