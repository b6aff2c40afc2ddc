"""Groups of a weight's input channels on one step, from the scheme to files and runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.deploy.codes import WeightCodes, layer_codes
from ptq4sam.errors import ConfigError
from ptq4sam.operators.base import QuantizedLayer, put_weights_on_grid
from ptq4sam.operators.convolution import QuantizedConv2d
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.groups import doubled, octaves_of, step_of
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import FixedQuantizer, Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Scheme

SCHEME = Path(__file__).parents[2] / "exp/w8a8.yaml"


def uneven(*shape: int) -> torch.Tensor:
    """A weight whose input channels differ by up to 2^5."""
    torch.manual_seed(0)
    sizes = 2.0 ** -torch.arange(shape[1]).div(6, rounding_mode="floor").clamp(max=5)
    return torch.randn(*shape) * sizes.reshape(1, -1, *[1] * (len(shape) - 2))


def grouped(grid: Grid, weight: torch.Tensor, size: int = 8) -> FixedQuantizer:
    quantizer = FixedQuantizer(grid, channel_axis=0)
    quantizer.group_size = size
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(weight)
    return quantizer


def expected(weight: np.ndarray, bits: int, symmetric: bool, size: int) -> np.ndarray:
    """Group by group in float64, as the head of groups.py says it."""
    found = np.empty_like(weight, dtype=np.float64)
    last = 2**bits - 1
    for row, out in zip(weight.astype(np.float64), found, strict=True):
        groups = [slice(first, first + size) for first in range(0, row.shape[0], size)]
        ends = [(min(0.0, row[g].min()), max(0.0, row[g].max())) for g in groups]
        if symmetric:
            scales = [max(-low, high) / (last / 2) for low, high in ends]
        else:
            scales = [(high - low) / last for low, high in ends]
        room = 8 - bits - (0 if symmetric else 1)
        unit = max(scales) / 2**room
        for group, (low, _), scale in zip(groups, ends, scales, strict=True):
            step = unit * 2 ** max(0, int(np.ceil(np.log2(scale / unit))))
            zero = 0 if symmetric else np.clip(-np.round(low / step), 0, last)
            first = -(2 ** (bits - 1)) if symmetric else 0
            codes = np.clip(np.round(row[group] / step) + zero, first, first + last)
            out[group] = (codes - zero) * step
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("shape", [(6, 48), (5, 16, 3, 3)])
def test_weights_are_those_of_the_formula(
    bits: int, symmetric: bool, shape: tuple[int, ...]
) -> None:
    weight = uneven(*shape)
    quantizer = grouped(Grid(bits, symmetric), weight)
    found = quantizer(weight)
    wanted = expected(weight.numpy(), bits, symmetric, 8)
    same = np.isclose(found.numpy(), wanted, rtol=1e-5, atol=1e-9)
    # Ends of symmetric ranges lie between two points, to the last bit of float32.
    apart = [np.abs(weight.numpy() - points) for points in (found.numpy(), wanted)]
    assert (same | np.isclose(*apart, rtol=1e-4)).all()
    assert same.mean() > 0.9
    steps = quantizer.steps(weight)
    assert torch.equal(steps, steps.round())
    assert -128 <= float(steps.min()) <= float(steps.max()) <= 127
    sides = (-1, *[1] * (len(shape) - 1))
    assert torch.equal(found, steps * quantizer.step.reshape(sides))
    assert bool(quantizer.grid_in_use().holds(found.double(), 0).all())


def test_groups_are_never_coarser_and_pay() -> None:
    weight = uneven(16, 48)
    alone = FixedQuantizer(Grid(4), channel_axis=0)
    with quantizer_mode(alone, Mode.OBSERVE):
        alone(weight)
    quantizer = grouped(Grid(4), weight)
    assert bool((quantizer.scale <= alone.scale[:, None] * (1 + 1e-6)).all())
    errors = [float((q(weight) - weight).square().mean()) for q in (quantizer, alone)]
    assert errors[0] < 0.5 * errors[1]


def test_learned_rounding_moves_within_groups() -> None:
    weight = uneven(4, 24)
    quantizer = AdaRoundQuantizer(Grid(3), channel_axis=0)
    quantizer.group_size = 8
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(weight)
    quantizer.begin_learning(weight)
    quantizer.alpha.data.neg_()
    quantizer.finish_learning()
    steps = quantizer.steps(weight)
    assert torch.equal(quantizer(weight), steps * quantizer.step[:, None])
    nearest = grouped(Grid(3), weight).steps(weight)
    assert not torch.equal(steps, nearest)
    assert bool(quantizer.grid_in_use().holds_steps(steps.double(), 0).all())


def layer(source: nn.Linear | nn.Conv2d, bits: int) -> QuantizedLayer:
    kind = QuantizedLinear if isinstance(source, nn.Linear) else QuantizedConv2d
    source.weight.data = uneven(*source.weight.shape)
    weight, inputs = FixedQuantizer(Grid(bits), channel_axis=0), FixedQuantizer(Grid(8))
    weight.group_size = 8
    made = kind(source, weight, inputs)  # type: ignore[arg-type]
    with quantizer_mode(made, Mode.OBSERVE):
        made(torch.randn(3, 24) if made.weight.dim() == 2 else torch.randn(2, 24, 5, 5))
    put_weights_on_grid(made)
    return made.requires_grad_(False)


@pytest.mark.parametrize("source", [nn.Linear(24, 6), nn.Conv2d(24, 6, 3)])
def test_products_are_of_whole_numbers(source: nn.Linear | nn.Conv2d) -> None:
    made = layer(source, 4)
    x = torch.randn(3, 24) if made.weight.dim() == 2 else torch.randn(2, 24, 5, 5)
    rounded = made.input_quantizer(x).double()
    convolve = nn.functional.linear if made.weight.dim() == 2 else nn.functional.conv2d
    assert made.bias is not None
    wanted = convolve(rounded, made.weight.double(), made.bias.double())
    torch.testing.assert_close(made(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_codes_give_the_weight_and_its_steps_back() -> None:
    made = layer(nn.Linear(24, 6), 4)
    codes = layer_codes(made)
    assert codes.scale.shape == (6, 3)
    assert int(codes.codes.min()) >= 0
    assert int(codes.codes.max()) <= 15
    assert torch.equal(codes.steps() * codes.step[:, None], made.weight)
    again = step_of(codes.scale)[:, None] * doubled(octaves_of(codes.scale))
    assert torch.equal(again, codes.scale)
    assert torch.equal(
        WeightCodes(codes.codes, again, codes.zero_point, codes.grid).weight(), made.weight
    )


def test_channels_that_leave_some_over_are_refused() -> None:
    quantizer = FixedQuantizer(Grid(4), channel_axis=0)
    quantizer.group_size = 7
    with pytest.raises(ConfigError, match=r"24 input channels .* groups of 7, which leaves 3"):
        QuantizedLinear(nn.Linear(24, 6), quantizer, FixedQuantizer(Grid(4)))
    quantizer.group_size = 100
    assert quantizer.parameter_shape(torch.Size((6, 24))) == (6, 1)


def test_a_scheme_reads_and_writes_groups() -> None:
    scheme = Scheme.from_yaml(SCHEME).with_overrides("w_qconfig.bit=4")
    mapping = scheme.to_dict()
    assert "group_size" not in mapping["w_qconfig"]
    given = {**mapping["w_qconfig"], "granularity": "per group", "group_size": 8}
    given.pop("ch_axis")
    found = Scheme.from_dict({**mapping, "w_qconfig": given})
    assert (found.w_qconfig.ch_axis, found.w_qconfig.group_size) == (0, 8)
    assert Scheme.from_dict(found.to_dict()) == found
    assert found.with_bits(8, 8).w_qconfig.group_size == 0
    assert found.with_bits(3, 8).w_qconfig.group_size == 8


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"w_qconfig": {"group_size": 0}}, "w_qconfig.group_size: missing"),
        ({"w_qconfig": {"bit": 8}}, "w_qconfig.group_size: scales of groups .* up to 7 bits"),
        ({"w_qconfig": {"quantizer": "LSQFakeQuantize"}}, "w_qconfig.quantizer: .* learns scales"),
        (
            {"a_qconfig": {"ch_axis": 0, "group_size": 8, "observer": "MinMaxObserver"}},
            "a_qconfig.group_size: .* grouped",
        ),
        ({"slots": {"input": {"granularity": "per group"}}}, "slots.input.granularity: .* grouped"),
    ],
)
def test_what_cannot_have_groups_is_named(
    change: dict[str, dict[str, object]], problem: str
) -> None:
    mapping = Scheme.from_yaml(SCHEME).with_overrides("w_qconfig.bit=4").to_dict()
    mapping["w_qconfig"] |= {"granularity": "per group", "group_size": 8}
    for section, fields in change.items():
        mapping[section] = {**mapping.get(section, {}), **fields}
    with pytest.raises(ConfigError, match=problem):
        Scheme.from_dict(mapping)


@pytest.mark.parametrize("granularity", ["per channel", "per tensor"])
def test_groups_are_not_left_in_silence(granularity: str) -> None:
    """As --set w_qconfig.granularity="per channel" on a scheme with groups."""
    scheme = Scheme.from_yaml("ptq4sam-s44").with_overrides(
        "w_qconfig={quantizer: FixedFakeQuantize, observer: MinMaxObserver, bit: 4, granularity: "
        "per group, group_size: 16}"
    )
    with pytest.raises(ConfigError, match=rf"w_qconfig.group_size: 16 given with .*{granularity}"):
        scheme.with_overrides(f'w_qconfig.granularity="{granularity}"')
    again = scheme.with_overrides(
        f'w_qconfig.granularity="{granularity}"', "w_qconfig.group_size=0"
    )
    assert again.w_qconfig.group_size == 0
