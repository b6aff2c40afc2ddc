"""Heads with scales of their own: each is what it is alone, quantized with one scale a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.operators import attention
from ptq4sam.operators.arithmetic import Arithmetic
from ptq4sam.operators.attention import QuantizedSoftmaxAttention, SoftmaxAttention
from ptq4sam.operators.base import QuantizedOperator
from ptq4sam.operators.bias import RelativePositions, TableBias
from ptq4sam.operators.linear_attention import QuantizedReluLinearAttention, ReluLinearAttention
from ptq4sam.quantization.affine import AffineQuantizer, FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import LSQQuantizer, Mode
from ptq4sam.quantization.slots import HEADS
from tests.devices import on_devices

ROLES = ("query", "key", "value")
SIZE = 4


def operands(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Heads of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.1, 1.0, 7.0])[:, None, None]
    drawn = torch.randn(3, 2, 3, SIZE**2, 8, generator=generator) * sizes
    query, key, value = drawn.to(device)
    return query / sizes.to(device).sqrt(), key, value + 0.1


def made(
    kind: str, symmetric: bool, given: tuple[Tensor, ...], axis: int | None = HEADS
) -> QuantizedOperator:
    slots: list[AffineQuantizer] = [
        FixedQuantizer(Grid(8, symmetric), channel_axis=axis) for _ in ROLES
    ]
    core: QuantizedOperator
    if kind == "softmax":
        softmax = FixedQuantizer(Grid(8, symmetric))
        core = QuantizedSoftmaxAttention(SoftmaxAttention(8**-0.5), *slots, softmax)
    else:
        state = FixedQuantizer(Grid(16, symmetric=True))
        core = QuantizedReluLinearAttention(ReluLinearAttention(), *slots, state)
    core.to(given[0].device)
    with quantizer_mode(core, Mode.OBSERVE):
        core(*given)
    return core


def bias_of(kind: str, heads: slice) -> Any:
    generator = torch.Generator().manual_seed(1)
    tables = torch.randn(2, 2 * SIZE - 1, 8, generator=generator)
    table = torch.randn(3, SIZE**2, SIZE**2, generator=generator)[heads]
    return {
        "none": None,
        "table": TableBias(table),
        "positions": RelativePositions(*tables, (SIZE, SIZE)),
    }[kind]


@torch.no_grad()
@pytest.mark.parametrize("arithmetic", [Arithmetic.WHOLE, Arithmetic.INTEGER])
@pytest.mark.parametrize("piece", [1, 2000, 2**30])
@pytest.mark.parametrize("bias", ["none", "table", "positions"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_head_is_what_it_is_alone(
    symmetric: bool,
    bias: str,
    piece: int,
    arithmetic: Arithmetic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_SOFTMAX_BYTES", {"cpu": piece})
    given = operands()
    core = made("softmax", symmetric, given)
    core.arithmetic = arithmetic
    found = core(*given, bias_of(bias, slice(None)))
    for head in range(3):
        part = slice(head, head + 1)
        own = tuple(x[:, part] for x in given)
        alone: Any = made("softmax", symmetric, own, axis=None)
        alone.softmax_quantizer = core.quantizer("softmax")
        alone.arithmetic = arithmetic
        assert torch.equal(found[:, part], alone(*own, bias_of(bias, part)))


@torch.no_grad()
@pytest.mark.parametrize("arithmetic", [Arithmetic.WHOLE, Arithmetic.INTEGER])
@pytest.mark.parametrize("symmetric", [True, False])
def test_so_is_one_of_a_linear_attention(symmetric: bool, arithmetic: Arithmetic) -> None:
    given = operands()
    core = made("linear", symmetric, given)
    core.arithmetic = arithmetic
    found = core(*given)
    for head in range(3):
        own = tuple(x[:, head : head + 1] for x in given)
        alone: Any = made("linear", symmetric, own, axis=None)
        alone.state_quantizer = core.quantizer("state")
        alone.arithmetic = arithmetic
        assert torch.equal(found[:, head : head + 1], alone(*own))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_whole_numbers_are_near_scaled_values(kind: str) -> None:
    given = operands()
    core = made(kind, True, given)
    found = core(*given)
    core.arithmetic = Arithmetic.LEARNING
    scaled = core(*given)
    assert (found - scaled).norm() < 1e-2 * scaled.norm()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_one_operand_alone_may_have_them(kind: str) -> None:
    """Small heads lose nothing by large ones where all three have them."""
    given = operands()
    with quantizer_mode(core := made(kind, True, given), Mode.FLOAT):
        exact = core(*given)

    def error(core: QuantizedOperator) -> Tensor:
        off = core(*given) - exact
        sizes = [x.transpose(0, 1).flatten(1).norm(dim=1) for x in (off, exact)]
        return sizes[0] / sizes[1]

    one = made(kind, True, given, axis=None)
    each = made(kind, True, given)
    assert float(error(each)[0]) < 0.6 * float(error(one)[0])
    for role in ROLES:
        mixed: Any = made(kind, True, given, axis=None)
        setattr(mixed, f"{role}_quantizer", each.quantizer(role))
        mixed.arithmetic = Arithmetic.INTEGER
        summed = mixed(*given)
        mixed.arithmetic = Arithmetic.WHOLE
        assert torch.equal(summed, mixed(*given))
        assert not torch.equal(summed, one(*given))


@on_devices
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_points_and_codes_are_those_of_each_head(device: torch.device, batch: int) -> None:
    x = operands(device)[0]
    quantizer = FixedQuantizer(Grid(4), channel_axis=HEADS).to(device)
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(x)
    x = x[:batch]
    for give in (quantizer, quantizer.codes, quantizer.steps):
        found = give(x)
        assert found.shape == x.shape
        for head in range(3):
            alone = FixedQuantizer(Grid(4)).to(device)
            alone.set_parameters(quantizer.scale[head], quantizer.zero_point[head])
            own = {quantizer: alone, quantizer.codes: alone.codes, quantizer.steps: alone.steps}
            assert torch.equal(found[:, head], own[give](x[:, head]))


def test_scales_of_heads_learn_apart() -> None:
    x = operands()[0]
    both = LSQQuantizer(Grid(4, symmetric=True), channel_axis=HEADS)
    with quantizer_mode(both, Mode.OBSERVE):
        both(x)
    assert both.learned()[0].shape == (3,)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    given = x.clone().requires_grad_()
    (both(given) * weights).sum().backward()
    for head in range(3):
        alone = LSQQuantizer(Grid(4, symmetric=True))
        alone.set_parameters(both.scale.detach()[head].clone(), torch.zeros(()))
        own = x[:, head].clone().requires_grad_()
        (alone(own) * weights[:, head]).sum().backward()
        assert both.scale.grad is not None
        torch.testing.assert_close(both.scale.grad[head], alone.scale.grad)
        assert given.grad is not None
        assert own.grad is not None
        assert torch.equal(given.grad[:, head], own.grad)


def test_other_heads_are_refused() -> None:
    quantizer = FixedQuantizer(Grid(4), channel_axis=HEADS)
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(operands()[0])
    with pytest.raises(ConfigError, match=r"\[1, 1, 5, 8\] came to 3 scales, one a head"):
        quantizer(torch.zeros(1, 1, 5, 8))
