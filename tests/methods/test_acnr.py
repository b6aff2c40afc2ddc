"""Conditioned weights against the published loop, which decomposes the weight every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.methods.acnr import Acnr, InputErrors, conditioned
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]


def published(weight: NDArray[np.float64], error: NDArray[np.float64], times: int) -> Tensor:
    """AHCQ-SAM's loop on a weight [in, out] and errors of inputs [rows, in]."""
    for _ in range(times):
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        mean = s.mean()
        c = ((error @ u) ** 2).mean(0)
        new = (s + 2 * 0.003 * mean) / (1 + 2 * 0.003 + 2 * 0.001 * c)
        share = np.cumsum(s**2) / np.sum(s**2)
        kept = int(np.searchsorted(share, 0.8)) + 1
        s[kept:] = np.maximum(s[kept:], new[kept:])
        weight = u @ np.diag(s) @ v
    return torch.from_numpy(weight)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((6, 10), np.geomspace(5, 0.01, 6)),
        ((10, 6), np.geomspace(5, 0.01, 6)),
        # The last one to stay is below the mean.
        ((8, 8), np.array([2, 0.82, 0.81, 0.8, 0.79, 0.78, 0.77, 0.005])),
    ],
)
def test_one_decomposition_gives_what_two_hundred_give(
    shape: tuple[int, int], values: NDArray[np.float64]
) -> None:
    random = np.random.default_rng(sum(shape))
    inputs, outputs = shape
    left = np.linalg.qr(random.standard_normal((inputs, inputs)))[0]
    right = np.linalg.qr(random.standard_normal((outputs, outputs)))[0]
    few = min(shape)
    weight = left[:, :few] @ np.diag(values) @ right[:few]
    error = random.standard_normal((40, inputs)) * np.geomspace(1, 0.1, inputs)
    errors = InputErrors(torch.from_numpy(error.T @ error), 40)
    found = conditioned(torch.from_numpy(weight.T), errors, Acnr())
    assert found is not None
    expected = published(weight, error, 200).t()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert float((found - torch.from_numpy(weight.T)).abs().max()) > 0.1
    # Better conditioned, and a weight that is so already stays.
    assert np.linalg.cond(found.numpy()) < 0.2 * np.linalg.cond(weight)
    assert conditioned(torch.eye(inputs), errors, Acnr()) is None


def test_a_model_is_conditioned_frozen_and_its_float_part_stays(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
) -> None:
    scheme = make_scheme(4, 2, methods={"acnr": {"condition": 5.0}}, ptq4sam={})
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    quantized = quantize_sam(sam, items[:2], scheme)
    assert quantized.applied["acnr"]
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
    assert audit(quantized, lambda: forward(quantized)).findings == ()
    without = quantize_sam(sam, items[:2], scheme.with_overrides("methods=[]"))
    for name in quantized.applied["acnr"]:
        values = [
            np.linalg.svd(model.get_submodule(name).get_parameter("weight").numpy())[1]
            for model in (quantized, without)
        ]
        assert values[0][-3:].sum() > 0.9 * values[1][-3:].sum()


def test_settings_are_checked() -> None:
    for wrong in ({"towards_mean": 0}, {"times": 0}, {"energy": 1.0}, {"condition": 0.5}):
        with pytest.raises(ConfigError, match="allowed"):
            Acnr(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="allowed"):
        Acnr(against_error=-1.0)
