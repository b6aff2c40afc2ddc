"""Groups of channels on one step, against grids made channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import CalibrationError, ConfigError
from ptq4sam.methods.grouped import Grouped, GroupedQuantizer, grouped_points
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import LSQQuantizer, Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
KINDS = ((-3.0, 0.3), (0.0, 3.0), (0.0, 0.3), (2.0, 0.5))
"""Middle and spread of four kinds of channels."""


def inputs(seed: int = 0, channels: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(50, channels, generator=generator) * 2 - 1
    kinds = torch.tensor(KINDS)[torch.arange(channels) % len(KINDS)]
    return x * kinds[:, 1] + kinds[:, 0]


def calibrated(x: Tensor, bits: int = 4, groups: int = 4) -> GroupedQuantizer:
    quantizer = GroupedQuantizer(Grid(bits), Grouped(groups))
    with quantizer_mode(quantizer, Mode.OBSERVE):
        for batch in x if x.dim() == 3 else (x,):
            quantizer(batch, torch.zeros(x.shape[-1], 1))
    return quantizer.requires_grad_(False)


def test_more_groups_than_the_scheme_has_are_found() -> None:
    quantizer = calibrated(inputs(), groups=4)
    quantizer.ratio[3] *= 2
    assert "has 5 groups of channels, its scheme has 4" in list(quantizer.problems())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("groups", [1, 4, 24])
def test_points_are_bytes_and_reach_to_the_ends_of_their_channels(bits: int, groups: int) -> None:
    x = inputs(bits)
    quantizer = calibrated(x, bits, groups)
    assert list(quantizer.problems()) == []
    low, high = quantizer.step_bounds
    assert low <= 0 <= high <= low + 255
    points = quantizer.grid_in_use().points()
    assert points.shape == (24, 2**bits)
    # The next point of the same distance would be beyond what was seen, or at it.
    distance = (points[:, 1] - points[:, 0]) / 2 * 1.001
    assert bool((points[:, 0] - distance <= x.amin(0)).all())
    assert bool((points[:, -1] + distance >= x.amax(0)).all())
    assert len(quantizer.grid_in_use().whole_points().unique(dim=0)) <= groups


def test_alike_channels_share_points_and_each_goes_to_its_nearest() -> None:
    x = inputs()
    quantizer = calibrated(x)
    points = quantizer.grid_in_use().points().numpy()
    for kind in range(4):
        assert len(np.unique(points[kind::4], axis=0)) == 1
    found, codes = quantizer(x).numpy(), quantizer.codes(x).numpy()
    for channel in range(24):
        nearest = np.abs(x[:, channel, None].double().numpy() - points[channel]).argmin(1)
        assert (codes[:, channel] == nearest).mean() > 0.99  # but for ties
        np.testing.assert_allclose(found[:, channel], points[channel][codes[:, channel]], rtol=1e-6)
    steps = quantizer.steps(x)
    torch.testing.assert_close(steps * quantizer.step, quantizer(x))
    assert bool(quantizer.grid_in_use().holds_steps(steps.double()).all())
    # Channel by channel: points of another kind of channel are none.
    assert not bool(quantizer.grid_in_use().holds_steps(steps.double().roll(1, 1)).all())
    # Ten times nearer than one even grid of as many points.
    one = LSQQuantizer(Grid(4))
    with quantizer_mode(one, Mode.OBSERVE):
        one(x)
    narrow = slice(2, None, 4)
    errors = [(q(x) - x)[:, narrow].square().mean() for q in (quantizer, one)]
    assert errors[0] < 0.1 * errors[1]


def test_ends_are_the_means_of_batches() -> None:
    x = torch.stack([inputs(0), 2 * inputs(1)])
    both = calibrated(x, groups=24)
    low, high = x.amin(1).double().mean(0).numpy(), x.amax(1).double().mean(0).numpy()
    step, zero, ratio = grouped_points(low, high, 4, 24)
    assert float(both.scale) == pytest.approx(step)
    assert (both.zero_point.tolist(), both.ratio.tolist()) == (zero.tolist(), ratio.tolist())


def test_gradients_are_those_of_lsq() -> None:
    x = inputs().double().float()
    quantizer = calibrated(x)
    x = (1.3 * x).requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    quantizer.scale.requires_grad_(True)
    (quantizer(x) * weight).sum().backward()
    given, scale = x.detach(), quantizer.step * quantizer.ratio
    code = given / scale + quantizer.zero_point
    inside = (code.round() >= 0) & (code.round() <= 15)
    assert 0.5 < float(inside.float().mean()) < 1
    steps = quantizer.steps(given)
    expected = torch.where(inside, steps - given / quantizer.step, steps) * weight
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad) == pytest.approx(float(expected.sum()), rel=1e-3)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inside * weight)


def test_what_it_is_not_for() -> None:
    quantizer = GroupedQuantizer(Grid(4))
    quantizer.name = "image_encoder.neck.0.input_quantizer"
    with (
        quantizer_mode(quantizer, Mode.OBSERVE),
        pytest.raises(CalibrationError, match=r"neck\.0.*only inputs of linear layers have"),
    ):
        quantizer(torch.randn(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="grouped has up to 8"):
        GroupedQuantizer(Grid(9))
    with pytest.raises(ConfigError, match="1 or more"):
        Grouped(0)
    flat = calibrated(torch.zeros(5, 3))
    assert torch.equal(flat(torch.zeros(5, 3)), torch.zeros(5, 3))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_has_them_saved_audited_and_in_integers(
    steps: int,
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
    tmp_path: Path,
) -> None:
    slots = {"input@decoder": {"grid": "grouped"}}
    scheme = make_scheme(4, steps, slots=slots, ptq4sam={"AGQ": True})
    quantized = quantize_sam(sam, items[:2], scheme)
    report = audit(quantized, lambda: forward(quantized))
    assert report.findings == ()
    save(quantized, tmp_path / "grouped.safetensors")
    expected = forward(quantized)
    for other in (load(tmp_path / "grouped.safetensors"), integer_model(quantized)):
        assert all(map(torch.equal, forward(other), expected))
