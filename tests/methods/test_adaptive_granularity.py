from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq4sam.errors import CalibrationError
from ptq4sam.methods import granularity_search
from ptq4sam.methods.adaptive_granularity import TAUS, AdaptiveGranularityQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import Mode


def attention(spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, 3, 8, 16, generator=generator)
    return logits.softmax(-1), torch.randn(2, 3, 16, 5, generator=generator)


def calibrated(bits: int = 4, batches: int = 1) -> AdaptiveGranularityQuantizer:
    quantizer = AdaptiveGranularityQuantizer(Grid(bits))
    quantizer.mode = Mode.OBSERVE
    for seed in range(batches):
        quantizer(*attention(seed=seed))
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def naive(x: Tensor, scale: float, tau: float, bits: int) -> Tensor:
    codes = torch.round(-tau * torch.log2(x.clamp(min=1e-20) / scale))
    points = scale * 2.0 ** (-codes.clamp(0, 2**bits - 1) / tau)
    return torch.where(codes >= 2**bits, 0.0, points)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("grad", [False, True])
def test_points(tau: int, bits: int, grad: bool) -> None:
    quantizer = calibrated(bits)
    quantizer.tau.fill_(tau)
    x, _ = attention(spread=6)
    x[0, 0, 0] = 0
    x[0, 0, 0, 0] = 1
    with torch.set_grad_enabled(grad):
        actual = quantizer(x)
    torch.testing.assert_close(actual.detach(), naive(x, quantizer.scale.item(), tau, bits))


def test_input_is_left_alone() -> None:
    x, value = attention()
    before = x.clone()
    quantizer = calibrated()
    quantizer(x)
    with torch.no_grad():
        quantizer(x)
    quantizer.codes(x)
    quantizer.mode = Mode.OBSERVE
    quantizer(x, value)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_shift_and_table_give_the_points(bits: int) -> None:
    """2^(-code / tau) is a shift by code div tau of the table entry for code mod tau."""
    quantizer = calibrated(bits)
    x, _ = attention(spread=6, seed=4)
    codes, tau = quantizer.codes(x), int(quantizer.tau)
    table = torch.tensor([2.0 ** (-index / tau) for index in range(tau)])
    shifted = table[codes % tau] / 2.0 ** (codes // tau)
    shifted[codes == 2**bits] = 0
    torch.testing.assert_close(
        shifted * quantizer.scale.detach(), quantizer(x).detach(), rtol=1e-6, atol=0
    )


def test_errors_are_those_of_the_product() -> None:
    x, value = attention()
    quantizer = calibrated()
    exact = x @ value

    def error(scale: float, tau: int) -> float:
        return float((naive(x, scale, tau, 4) @ value - exact).abs().pow(2.4).mean())

    for tau, scale, found in zip(TAUS, quantizer.tau_scales, quantizer.tau_errors, strict=True):
        assert found == pytest.approx(error(scale, tau), rel=1e-3)
        # The error is jagged, so that the minimisation finds a good scale, not always the best.
        everywhere = [error(s, tau) for s in torch.linspace(0.01, float(x.max()), 100).tolist()]
        assert found < sorted(everywhere)[25]
    assert TAUS[quantizer.tau_errors.index(min(quantizer.tau_errors))] == int(quantizer.tau)


@pytest.mark.parametrize(("bits", "spread"), [(3, 1.0), (4, 2.0), (4, 6.0), (6, 3.0)])
def test_a_search_on_a_grid_finds_the_least_error(bits: int, spread: float) -> None:
    """Compared with a scan of 3000 scales, and with the bounded search."""
    x, value = attention(spread)
    exact = x @ value
    largest = float(x.max())
    scan = torch.logspace(math.log2(min(0.1, 0.01 * largest)), math.log2(largest), 3000, base=2)
    ends = []
    for search in ("grid", "bounded"):
        quantizer = AdaptiveGranularityQuantizer(Grid(bits), search=search)
        quantizer.mode = Mode.OBSERVE
        quantizer(x, value)
        ends.append(quantizer)
    for index, tau in enumerate(TAUS):
        errors = [
            float((naive(x, scale, tau, bits) @ value - exact).abs().pow(2.4).mean())
            for scale in scan.tolist()
        ]
        found = ends[0].tau_errors[index]
        moved = naive(x, ends[0].tau_scales[index], tau, bits)
        assert found == pytest.approx(
            float((moved @ value - exact).abs().pow(2.4).mean()), rel=1e-3
        )
        assert found <= 1.02 * min(errors)
        assert found <= ends[1].tau_errors[index] * (1 + 1e-5)


@pytest.mark.parametrize("queries", [400, 2000])
def test_many_queries_are_searched_on_some_and_settled_on_all(queries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(2, 8, queries, 12, generator=generator)).softmax(-1)
    value = torch.randn(2, 8, 12, 6, generator=generator)
    scales, errors = granularity_search.least_error(x, value, 16, TAUS)
    best = errors.index(min(errors))
    search = granularity_search.ScaleSearch(x, value, 16, 1e-3 * float(x.max()))
    bounded, least = search.best_scale(TAUS[best], float(x.max()))
    assert search.error(TAUS[best], scales[best]) <= least * 1.01, bounded


def test_errors_of_many_scales_are_those_of_each() -> None:
    x, value = attention()
    search = granularity_search.ScaleSearch(x, value, 16, 1e-3)
    scales = [0.05, 0.3, 0.31, 0.9]
    for tau in TAUS:
        alone = [search.error(tau, scale) for scale in scales]
        assert search.errors(tau, scales) == pytest.approx(alone, rel=1e-5)


def test_batches_average_scales_and_add_errors() -> None:
    together = calibrated(batches=3)
    alone = []
    for seed in range(3):
        quantizer = AdaptiveGranularityQuantizer(Grid(4))
        quantizer.mode = Mode.OBSERVE
        quantizer(*attention(seed=seed))
        alone.append(quantizer)
    for index in range(3):
        scales = [quantizer.tau_scales[index] for quantizer in alone]
        assert together.tau_scales[index] == pytest.approx(sum(scales) / 3)
        errors = [quantizer.tau_errors[index] for quantizer in alone]
        assert together.tau_errors[index] == pytest.approx(sum(errors))
    best = together.tau_errors.index(min(together.tau_errors))
    assert together.scale.item() == pytest.approx(together.tau_scales[best])


@pytest.mark.parametrize("elements", [16, 100, 500, 10**6])
def test_pieces_do_not_change_the_search(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = calibrated()
    monkeypatch.setitem(granularity_search._PIECE, "cpu", elements)
    actual = calibrated()
    assert actual.tau_errors == pytest.approx(expected.tau_errors, rel=1e-3)
    assert actual.tau_scales == pytest.approx(expected.tau_scales, rel=1e-3)


def test_gradients_are_those_of_the_smooth_function() -> None:
    """Straight through: what rounding adds to the code counts as a constant."""
    bits, tau, scale = 3, 2, 0.4
    quantizer = AdaptiveGranularityQuantizer(Grid(bits)).double()
    quantizer._set_parameters(torch.tensor(scale).double(), quantizer.zero_point)
    quantizer.tau.fill_(tau)
    x, value = (tensor.double() for tensor in attention(spread=4))
    x.requires_grad_()
    (quantizer(x) @ value).square().sum().backward()

    free_scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    free_x = x.detach().clone().requires_grad_()
    raw = -tau * torch.log2(free_x / free_scale)
    codes = raw + (raw.round() - raw).detach()
    points = free_scale * 2.0 ** (-codes.clamp(0, 2**bits - 1) / tau)
    smooth = torch.where(codes >= 2**bits, 0.0, points)
    (smooth @ value).square().sum().backward()
    torch.testing.assert_close(x.grad, free_x.grad)
    torch.testing.assert_close(quantizer.scale.grad, free_scale.grad)
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad.abs()) > 1e-3


def test_input_that_is_no_softmax() -> None:
    quantizer = AdaptiveGranularityQuantizer(Grid(4))
    quantizer.name, quantizer.mode = "attn.softmax", Mode.OBSERVE
    x, value = attention()
    with pytest.raises(CalibrationError, match=r"attn\.softmax.*value"):
        quantizer(x)
    with pytest.raises(CalibrationError, match=r"attn\.softmax.*from -"):
        quantizer(x - 0.5, value)
    with pytest.raises(CalibrationError, match="to 0"):
        quantizer(torch.zeros_like(x), value)


@pytest.mark.parametrize("count", [2, 2**20])
def test_what_is_not_a_number_is_found_behind_the_table(count: int) -> None:
    x = torch.full((count,), 0.25)
    x[1] = torch.nan
    steps = calibrated().steps(x)
    assert steps.isnan().nonzero().flatten().tolist() == [1]
