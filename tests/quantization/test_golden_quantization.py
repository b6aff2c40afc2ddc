"""Observers, quantizers and rounding against golden vectors."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.mse import range_loss
from ptq4sam.quantization.observers import OBSERVERS
from ptq4sam.quantization.quantizers import QUANTIZERS, Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from tests.golden_cases import NOT_WORSE, SEARCHED, GoldenCase

EXACT = 1e-5
_NOISE = (0.0, 1e-16, 1e-15)
"""Relative noise of losses: none, the last bit now and then, the last bit always."""


def close(actual: Tensor, expected: Tensor, relative: float = EXACT, absolute: float = 0.0) -> bool:
    """Whether two tensors of one value or the same shape agree to a share of the largest value."""
    expected = expected.reshape(actual.shape).double()
    allowed = relative * float(expected.abs().max()) + absolute
    return float((actual.detach().double() - expected).abs().max()) <= allowed


@pytest.mark.golden("observer")
def test_golden_observer(golden_case: GoldenCase) -> None:
    case, settings = golden_case, golden_case.parameters
    grid = Grid(settings["bit"], settings["symmetric"])
    axis = None if settings["ch_axis"] < 0 else settings["ch_axis"]
    observer = OBSERVERS[settings["observer"]](grid, axis)
    batches = case["x"]
    for batch in batches:
        observer.observe(batch)
    scale, zero_point = observer.quantization_parameters()
    fast = "Fast" in settings["observer"]
    matches = close(scale, case["scale"], SEARCHED if fast else EXACT) and torch.equal(
        zero_point.reshape(-1), case["zero_point"].reshape(-1)
    )
    if fast and not matches:
        # The end point of a minimisation over plateaus hangs on the last bit of the losses.
        ours, recorded = (
            _objective(batches, *ends, grid, axis)
            for ends in ((observer.minimum, observer.maximum), (case["min"], case["max"]))
        )
        matches = ours <= NOT_WORSE * recorded or _reached_with_other_last_bits(case, grid)
    elif not fast:
        size = float(batches.abs().max())
        assert close(observer.minimum, case["min"], EXACT, EXACT * size)
        assert close(observer.maximum, case["max"], EXACT, EXACT * size)
    assert matches, f"{scale} instead of {case['scale']}"


def _objective(batches: Tensor, low: Tensor, high: Tensor, grid: Grid, axis: int | None) -> float:
    """Mean |q(x) - x|^2.4 of all batches in one range."""
    rows = [x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1) for x in batches]
    ends = low.float().reshape(-1), high.float().reshape(-1)
    return float(torch.stack([range_loss(row, *ends, grid) for row in rows]).mean())


def _reached_with_other_last_bits(case: GoldenCase, grid: Grid) -> bool:
    """Whether the recorded range is an outcome of the same search with perturbed losses."""
    average = case.parameters["observer"].startswith("Avg")
    runs = [_ends_with_noise(batch, grid, seeds=60) for batch in case["x"].double().numpy()]
    recorded = np.array([float(case["min"]), float(case["max"])])
    for ends in product(*runs):
        low, high = np.transpose(ends)
        reached = (low.mean(), high.mean()) if average else (low.min(), high.max())
        if np.allclose(reached, recorded, rtol=0, atol=SEARCHED * np.ptp(recorded)):
            return True
    return False


def _ends_with_noise(x: np.ndarray, grid: Grid, seeds: int) -> list[tuple[float, float]]:
    """End points of the page's two-dimensional search, written for one tensor in float64."""

    def search(seed: int) -> tuple[float, float]:
        random = np.random.default_rng(seed)
        amount = _NOISE[seed % len(_NOISE)]

        def loss(width: float, shift: float) -> float:
            scale = width / grid.qmax
            zero = min(max(np.rint(shift / scale), 0), grid.qmax)
            codes = np.clip(np.rint(x / scale) + zero, 0, grid.qmax)
            error = (np.abs((codes - zero) * scale - x) ** 2.4).mean()
            return float(error * (1 + amount * random.standard_normal()))

        def inner(width: float) -> tuple[float, float]:
            found = minimize_scalar(
                lambda shift: loss(width, shift), bounds=(0, width), method="bounded"
            )
            return found.x, found.fun

        extent = float(np.ptp(x))
        bounds = (min(0.1, 0.01 * extent), extent)
        width = minimize_scalar(lambda w: inner(w)[1], bounds=bounds, method="bounded").x
        shift = inner(width)[0]
        return max(-shift, float(x.min())), min(width - shift, float(x.max()))

    ends = [search(seed) for seed in range(seeds)]
    return list({(round(low, 6), round(high, 6)) for low, high in ends})


@pytest.mark.golden("fake_quantize")
def test_golden_fake_quantize(golden_case: GoldenCase) -> None:
    case, settings = golden_case, golden_case.parameters
    quantizer = QUANTIZERS[settings["quantizer"]](Grid(settings["bit"]), settings["observer"])
    quantizer.mode = Mode.OBSERVE
    for batch in case["x"]:
        quantizer(batch)
    quantizer.mode = Mode.QUANTIZE
    x, gradient = case["x"][0].requires_grad_(), case["dy"]
    y = quantizer(x)
    (y * gradient).sum().backward()
    assert close(quantizer.scale, case["scale"])
    assert close(quantizer.zero_point, case["zero_point"])
    assert close(y, case["y"])
    assert x.grad is not None
    assert close(x.grad, case["dx"])
    # These are sums of terms of both signs, each a difference of two codes.
    codes = (y.detach() / quantizer.scale.detach()).abs() + 1
    terms = float((gradient.abs() * codes).sum()) / (x.numel() * quantizer.grid.qmax) ** 0.5
    for name in ("scale", "zero_point"):
        if f"d{name}" in case:
            grad = getattr(quantizer, name).grad
            assert grad is not None
            assert close(grad, case[f"d{name}"], EXACT, 1e-6 * terms), name


@pytest.mark.golden("adaround")
def test_golden_adaround(golden_case: GoldenCase) -> None:
    case, settings = golden_case, golden_case.parameters
    grid = Grid(settings["bit"], settings["symmetric"])
    quantizer = AdaRoundQuantizer(grid, settings["observer"], channel_axis=0)
    weight = case["w"]
    quantizer.mode = Mode.OBSERVE
    quantizer(weight)
    quantizer.mode = Mode.QUANTIZE
    assert close(quantizer.scale, case["scale"], SEARCHED)
    assert close(quantizer.zero_point, case["zero_point"])
    assert close(quantizer(weight), case["nearest"])

    quantizer.begin_learning(weight)
    assert close(quantizer(weight), case["soft_at_init"])
    with torch.no_grad():
        quantizer.alpha.add_(case["alpha_delta"])
    assert close(quantizer.alpha, case["alpha"])
    soft = quantizer(weight)
    (soft * case["dy"]).sum().backward()
    assert close(soft, case["soft"])
    assert quantizer.alpha.grad is not None
    assert close(quantizer.alpha.grad, case["dalpha"])

    quantizer.finish_learning()
    assert close(quantizer(weight), case["hard"])
