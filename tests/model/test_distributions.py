from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.distributions import (
    MOST_CHANNELS,
    Histogram,
    Softmax,
    channel_ranges,
    histogram,
    observe_distributions,
)
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.quantizers import FixedQuantizer
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

FINAL = "mask_decoder.transformer.final_attn_token_to_image"
MakeScheme = Callable[..., Scheme]


@pytest.fixture
def bimodal(sam: Sam, items: list[CalibrationItem], make_scheme: MakeScheme) -> QuantizedSam:
    """Half of the final attention's key channels far above zero, half far below."""
    projection = sam.get_submodule(f"{FINAL}.k_proj")
    signs = torch.where(torch.arange(projection.bias.numel()) % 2 == 0, 1.0, -1.0)
    with torch.no_grad():
        projection.bias.copy_(6 * signs)
    return quantize_sam(sam, items[:1], make_scheme())


def test_two_peaks_become_one_where_signs_were_folded(
    sam: Sam, bimodal: QuantizedSam, items: list[CalibrationItem]
) -> None:
    found = observe_distributions(sam, bimodal, items[0])
    final = next(one for one in found.attentions if one.name == FINAL)
    assert final.folded
    assert final.float_keys is not None
    assert final.float_keys.density is not None
    assert final.keys.density is not None
    assert len(final.float_keys.density.peaks) == 2
    assert len(final.keys.density.peaks) == 1
    # The same ranges, once around both peaks and once around one.
    assert min(final.float_keys.channels.high) < 0 < max(final.float_keys.channels.low)
    assert min(final.keys.channels.low) > 0 or max(final.keys.channels.high) < 0


def test_what_is_seen_is_what_hooks_of_ones_own_see(
    sam: Sam, bimodal: QuantizedSam, items: list[CalibrationItem]
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, inputs, output: seen.setdefault(name, output if name else inputs[0])

    projection = sam.get_submodule(f"{FINAL}.k_proj")
    handle = projection.register_forward_hook(keep("keys"))
    run_item(sam, items[0])
    handle.remove()
    layer = bimodal.get_submodule("image_encoder.neck.2")
    handle = layer.register_forward_hook(keep(""))
    run_item(bimodal, items[0])
    handle.remove()

    found = observe_distributions(sam, bimodal, items[0])
    final = next(one for one in found.attentions if one.name == FINAL)
    assert final.float_keys is not None
    keys = seen["keys"][0].numpy()
    counts, edges = np.histogram(keys, bins=len(final.float_keys.histogram.counts))
    # torch and numpy may put a value on an edge into either bin.
    assert np.abs(counts - final.float_keys.histogram.counts).sum() <= 4
    assert (edges[0], edges[-1]) == (
        final.float_keys.histogram.low,
        final.float_keys.histogram.high,
    )
    neck = next(one for one in found.layers if one.name == "image_encoder.neck.2")
    by_channel = seen[""].amax(dim=(0, 2, 3))
    np.testing.assert_allclose(neck.channels.high, by_channel.numpy(), rtol=1e-3)
    assert neck.range.bits == 4


def test_models_are_left_as_they_were(
    sam: Sam,
    bimodal: QuantizedSam,
    items: list[CalibrationItem],
    forward: Callable[[Sam], tuple[torch.Tensor, ...]],
) -> None:
    before = forward(bimodal)
    observe_distributions(sam, bimodal, items[0])
    assert all(torch.equal(a, b) for a, b in zip(before, forward(bimodal), strict=True))
    hooks = [
        hook
        for model in (sam, bimodal)
        for module in model.modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]
    assert hooks == []


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_levels_are_the_points_that_the_quantizer_gives(tau: int) -> None:
    quantizer = AdaptiveGranularityQuantizer(Grid(4))
    quantizer._set_parameters(torch.tensor(0.8), quantizer.zero_point)
    quantizer.tau.fill_(tau)
    points = quantizer(torch.logspace(-12, 0, 20_000)).unique().detach()
    levels = Softmax(Histogram(-24, 0, (1,)), 4, 0.8, tau).levels()
    expected = [0.0, *sorted(2**level for level in levels)]
    np.testing.assert_allclose(points.numpy(), expected, rtol=1e-5)


def test_levels_of_evenly_spaced_points() -> None:
    quantizer = FixedQuantizer(Grid(3))
    quantizer._set_parameters(torch.tensor(0.1), torch.tensor(1.0))
    points = quantizer(torch.linspace(-1, 1, 1000)).unique()
    levels = Softmax(Histogram(-24, 0, (1,)), 3, 0.1, zero_point=1).levels()
    np.testing.assert_allclose(points[points > 0], sorted(2**level for level in levels), rtol=1e-5)


def test_many_channels_share_entries_and_none_is_lost() -> None:
    x = torch.randn(7, 600, generator=torch.Generator().manual_seed(0))
    x[3, 599] = 50
    found = channel_ranges(x)
    assert (found.channels, found.together, len(found.low)) == (600, 3, 200)
    assert len(found.high) <= MOST_CHANNELS
    assert found.high[-1] == 50
    np.testing.assert_allclose(found.low[0], x[:, :3].min(), rtol=1e-3)


def test_a_constant_tensor_has_a_histogram() -> None:
    found = histogram(torch.full((3, 4), 2.0))
    assert sum(found.counts) == 12
