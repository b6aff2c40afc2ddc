"""Transposed convolutions on quantized operands, against torch's own on the same points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.errors import ConfigError
from ptq4sam.operators.arithmetic import Arithmetic, compute, learning
from ptq4sam.operators.base import observe_weights, put_weights_on_grid
from ptq4sam.operators.convolution import QuantizedConvTranspose2d
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode


def made(
    channel_axis: int | None = 0, side: int = 2, bits: int = 8
) -> tuple[nn.ConvTranspose2d, QuantizedConvTranspose2d, Tensor]:
    """A float layer, its calibrated quantized form, and an input."""
    torch.manual_seed(side)
    source = nn.ConvTranspose2d(6, 5, side, stride=side)
    x = torch.randn(2, 6, 4, 3) + 0.3
    quantized = QuantizedConvTranspose2d(
        source, FixedQuantizer(Grid(bits), channel_axis=channel_axis), FixedQuantizer(Grid(bits))
    )
    observe_weights(quantized)
    with quantizer_mode(quantized.input_quantizer, Mode.OBSERVE):
        quantized(x)
    return source, quantized, x


def transposed(weight: Tensor, side: int) -> Tensor:
    """The weight of the equal convolution as torch's transposed one has it: element by element."""
    outputs, inputs = len(weight) // side**2, weight.shape[1]
    result = torch.empty(inputs, outputs, side, side)
    for output in range(outputs):
        for row in range(side):
            for column in range(side):
                place = (output * side + row) * side + column
                result[:, output, row, column] = weight[place, :, 0, 0]
    return result


@pytest.mark.parametrize("side", [2, 3])
def test_without_quantization_it_is_the_float_layer(side: int) -> None:
    source, quantized, x = made(side=side)
    with quantizer_mode(quantized, Mode.FLOAT):
        assert torch.allclose(quantized(x), source(x), atol=1e-6)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("channel_axis", [0, None])
def test_it_is_torchs_own_on_the_points_of_both_grids(side: int, channel_axis: int | None) -> None:
    source, quantized, x = made(channel_axis, side)
    put_weights_on_grid(quantized)
    points = quantized.input_quantizer(x)
    assert not torch.equal(points, x)
    expected = F.conv_transpose2d(
        points.double(), transposed(quantized.weight, side).double(), stride=side
    )
    expected = expected + source.bias.double()[:, None, None]
    found = quantized(x)
    assert found.shape == (2, 5, 4 * side, 3 * side)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    with learning(quantized):
        assert torch.allclose(quantized(x), found, atol=1e-5)


def test_sums_are_those_of_integers() -> None:
    _, quantized, x = made()
    put_weights_on_grid(quantized)
    found = quantized(x)
    compute(quantized, Arithmetic.INTEGER)
    assert torch.equal(quantized(x), found)


def test_each_channel_and_place_has_its_scale() -> None:
    source, quantized, _ = made()
    assert quantized.weight_quantizer.scale.shape == (5 * 4,)
    rows = source.weight.permute(1, 2, 3, 0).flatten(0, 2)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    assert torch.allclose(quantized.weight_quantizer.scale, (high - low) / 255)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 4, 3, stride=2),
        nn.ConvTranspose2d(4, 4, 2, stride=2, padding=1),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        nn.ConvTranspose2d(4, 4, (2, 1), stride=(2, 1)),
        nn.ConvTranspose2d(4, 4, 2, stride=2, dilation=2),
    ],
)
def test_windows_that_overlap_are_refused_in_one_line(layer: nn.ConvTranspose2d) -> None:
    with pytest.raises(ConfigError, match="side by side") as caught:
        QuantizedConvTranspose2d(layer, FixedQuantizer(Grid(8)), FixedQuantizer(Grid(8)))
    assert "\n" not in str(caught.value)
