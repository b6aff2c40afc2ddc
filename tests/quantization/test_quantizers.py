from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.quantization.affine import AffineQuantizer
from ptq4sam.quantization.base import EPS, Quantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import QUANTIZERS, LSQPlusQuantizer, LSQQuantizer, Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer

KINDS = [*QUANTIZERS, "channels", "AGQ"]


def build(kind: str) -> Quantizer:
    if kind == "AGQ":
        return AdaptiveGranularityQuantizer(Grid(4))
    if kind == "channels":
        return QUANTIZERS["AdaRoundFakeQuantize"](Grid(4), "MSEObserver", 0)
    return QUANTIZERS[kind](Grid(4), "MinMaxObserver")


def data(kind: str, seed: int = 0) -> Tensor:
    x = 2 * torch.randn(6, 9, 9, generator=torch.Generator().manual_seed(seed))
    return x.softmax(-1) if kind == "AGQ" else x


def calibrated(kind: str) -> Quantizer:
    quantizer = build(kind)
    quantizer.mode = Mode.OBSERVE
    x = data(kind)
    quantizer(x, torch.randn(6, 9, 4, generator=torch.Generator().manual_seed(1)))
    quantizer.mode = Mode.QUANTIZE
    return quantizer


@pytest.mark.parametrize("kind", KINDS)
def test_observing_and_float_let_pass(kind: str) -> None:
    quantizer, x = build(kind), data(kind)
    for mode in (Mode.FLOAT, Mode.OBSERVE):
        quantizer.mode = mode
        assert quantizer(x, torch.ones(6, 9, 4)) is x
        assert quantizer.is_calibrated == (mode is Mode.OBSERVE)


@pytest.mark.parametrize("kind", KINDS)
def test_uncalibrated(kind: str) -> None:
    quantizer = build(kind)
    quantizer.name = "blocks.3.attn.softmax"
    for use in (quantizer, quantizer.codes):
        with pytest.raises(CalibrationError, match=r"blocks\.3\.attn\.softmax .*calibrate"):
            use(data(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_on_bad_values_names_the_quantizer(kind: str) -> None:
    quantizer, x = build(kind), data(kind)
    quantizer.name, quantizer.mode = "neck.2", Mode.OBSERVE
    x[0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"neck\.2.*1 of 486 observed values"):
        quantizer(x, torch.ones(6, 9, 4))
    assert not quantizer.is_calibrated


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_a_fixed_point(kind: str) -> None:
    quantizer = calibrated(kind)
    once = quantizer(data(kind, seed=7)).detach()
    assert torch.equal(quantizer(once), once)
    with torch.no_grad():
        assert torch.equal(quantizer(data(kind, seed=7)), once)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_give_the_output(kind: str) -> None:
    quantizer, x = calibrated(kind), data(kind, seed=7)
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32
    scale = quantizer.scale.detach()
    if isinstance(quantizer, AdaptiveGranularityQuantizer):
        restored = scale * torch.exp2(-codes / quantizer.tau)
        restored[codes == quantizer.grid.levels] = 0
        torch.testing.assert_close(restored, quantizer(x).detach(), rtol=1e-6, atol=0)
        assert codes.max() <= quantizer.grid.levels
    else:
        if kind == "channels":
            scale, zero = scale[:, None, None], quantizer.zero_point[:, None, None]
        else:
            zero = quantizer.zero_point
        assert torch.equal((codes - zero) * scale, quantizer(x))
        assert codes.max() <= quantizer.grid.qmax
    assert codes.min() >= quantizer.grid.qmin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_half_precision_are_those_of_the_values(kind: str, dtype: torch.dtype) -> None:
    """Computed in half precision, 7 % of them were the neighbour's."""
    quantizer, x = calibrated(kind), data(kind, seed=7).repeat(20, 1, 1).to(dtype)
    if kind == "channels":
        x = x[:6]
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    if isinstance(quantizer, AdaRoundQuantizer):
        quantizer.begin_learning(x)
        quantizer.finish_learning()
        assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
        assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_into_a_fresh_one(kind: str) -> None:
    quantizer, fresh, x = calibrated(kind), build(kind), data(kind, seed=7)
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.is_calibrated
    assert torch.equal(fresh(x), quantizer(x))
    # And back: an uncalibrated state must not pass for a calibrated one.
    fresh.load_state_dict(build(kind).state_dict())
    assert not fresh.is_calibrated


def test_state_has_no_running_statistics() -> None:
    assert set(calibrated("LSQFakeQuantize").state_dict()) == {"scale", "zero_point", "calibrated"}


def test_incomplete_state_is_refused() -> None:
    state = calibrated("LSQFakeQuantize").state_dict()
    del state["scale"]
    with pytest.raises(RuntimeError, match="scale"):
        build("LSQFakeQuantize").load_state_dict(state)


@pytest.mark.parametrize("kind", ["LSQFakeQuantize", "AGQ"])
@pytest.mark.parametrize("probability", [0.25, 0.5, 1.0])
def test_dropped_share(kind: str, probability: float) -> None:
    quantizer = calibrated(kind)
    x = data(kind, seed=3).repeat(40, 1, 1)
    exact = quantizer(x)
    quantizer.drop_probability = probability
    quantizer.generator = torch.Generator().manual_seed(11)
    dropped = quantizer(x)
    kept = dropped == x
    assert torch.equal(torch.where(kept, exact, dropped), exact)
    differing = exact != x
    share = float(kept[differing].float().mean())
    assert share == pytest.approx(probability, abs=4 * (0.25 / int(differing.sum())) ** 0.5)
    again = quantizer(x)
    assert probability == 1 or not torch.equal(again, dropped)
    quantizer.generator.manual_seed(11)
    assert torch.equal(quantizer(x), dropped)


def test_scale_gradient_factor() -> None:
    quantizer = calibrated("LSQFakeQuantize")
    assert isinstance(quantizer, LSQQuantizer)
    fixed = AffineQuantizer.quantize
    x = data("LSQFakeQuantize", seed=5)
    quantizer(x).square().sum().backward()
    assert quantizer.scale.grad is not None
    learned = quantizer.scale.grad.clone()
    quantizer.scale.grad = None
    fixed(quantizer, x).square().sum().backward()
    factor = (x.numel() * 15) ** -0.5
    assert float(learned) == pytest.approx(quantizer.scale.grad.item() * factor, rel=1e-5)


def test_a_step_across_zero_is_mended() -> None:
    quantizer = calibrated("LSQFakeQuantize")
    x = data("LSQFakeQuantize")
    expected = quantizer(x)
    with torch.no_grad():
        quantizer.scale.neg_()
    assert torch.equal(quantizer(x), expected)
    quantizer.constrain_()
    assert quantizer.scale.item() > 0
    with torch.no_grad():
        quantizer.scale.zero_()
    assert bool(torch.isfinite(quantizer(x)).all())
    quantizer.constrain_()
    assert quantizer.scale.item() == EPS


def test_learned_zero_point_stays_a_code() -> None:
    quantizer = calibrated("LSQPlusFakeQuantize")
    assert isinstance(quantizer, LSQPlusQuantizer)
    x = data("LSQPlusFakeQuantize")
    with torch.no_grad():
        quantizer.zero_point.add_(0.3)
    y = quantizer(x)
    steps = y / quantizer.scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert quantizer.codes(torch.zeros(1)).item() == round(quantizer.zero_point.item())


def test_a_zero_point_stays_among_the_codes_and_ends_whole() -> None:
    quantizer, symmetric = calibrated("LSQPlusFakeQuantize"), LSQPlusQuantizer(Grid(4, True))
    assert quantizer.learned() == [quantizer.scale, quantizer.zero_point]
    assert symmetric.learned() == [symmetric.scale]
    x = 3 * data("LSQPlusFakeQuantize")
    for value, code in ((6.3, 6), (-2.0, 0), (17.2, 15)):
        with torch.no_grad():
            quantizer.zero_point.fill_(value)
        quantizer.constrain_()
        before = quantizer(x)
        # Where it is cut off it still has a gradient, and can come back.
        (before * x).sum().backward()
        assert quantizer.zero_point.grad is not None
        assert quantizer.zero_point.grad.item() != 0
        quantizer.finish_learning()
        assert quantizer.zero_point.item() == code
        assert torch.equal(quantizer(x), before)


def test_learning_reduces_the_error() -> None:
    torch.manual_seed(0)
    quantizer = calibrated("LSQPlusFakeQuantize")
    with torch.no_grad():
        quantizer.scale.mul_(3)
    x = data("LSQPlusFakeQuantize")
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=5e-2)
    losses = []
    for _ in range(60):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.constrain_()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_scale_is_a_parameter_where_it_is_learned(kind: str) -> None:
    learned = kind.startswith("LSQ") or kind == "AGQ"
    assert isinstance(build(kind).scale, nn.Parameter) == learned
