"""Scales folded into norms: the same float model, and grids that fit channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import ConfigError
from ptq4sam.families import build_sam
from ptq4sam.methods import norm_scales
from ptq4sam.methods.channel_sizes import Seen, Strengths
from ptq4sam.methods.norm_scales import fold, folded_scales, output_error
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, apply_methods, run_item
from ptq4sam.model.exchange import take_units
from ptq4sam.model.insertion import insert_quantizers, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.switches import Switches
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
MakeScheme = Callable[..., Scheme]
LAYERS = [f"image_encoder.blocks.{b}.{layer}" for b in (0, 1) for layer in ("attn.qkv", "mlp.lin1")]
ONE = "methods={norm-scales: {strengths: [1.0]}}"


@pytest.fixture
def uneven(sam: Sam) -> Sam:
    """Channels behind norms of very different size."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in sam.image_encoder.named_modules():
            if isinstance(module, nn.LayerNorm) and "blocks" in name:
                module.weight *= torch.exp(
                    1.5 * torch.randn(module.weight.shape, generator=generator)
                )
                module.bias += torch.randn(module.bias.shape, generator=generator)
    return sam


def inputs_of(model: Sam, given: list[CalibrationItem]) -> dict[str, Tensor]:
    """Rows of the inputs of LAYERS."""
    found: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _layer, inputs, name=name: found[name].append(inputs[0].flatten(0, -2))
        )
        for name in LAYERS
    ]
    for item in given:
        run_item(model, item)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_scales_are_powers_of_sizes_around_their_geometric_mean() -> None:
    seen = Seen(4)
    x = torch.tensor([[1.0, -8, 0, 2], [0.5, 3, 0, 2]])
    seen.add(nn.Identity(), (x[None],))
    seen.add(nn.Identity(), (x[None] * torch.tensor([2.0, 0.1, 0, 1]),))
    sizes = np.array([2.0, 8.0, 2.0])
    for strength in (0.25, 1.0):
        found = seen.scales(strength)
        expected = (sizes / sizes.prod() ** (1 / 3)) ** strength
        np.testing.assert_allclose(found[[0, 1, 3]].numpy(), expected, rtol=1e-6)
        assert float(found[2]) == 1


def rounded(x: NDArray[np.float64], low: Any, high: Any, bits: int) -> NDArray[np.float64]:
    """Numbers on an even grid with 0 among its points, as textbooks have it."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def test_errors_are_those_of_the_quantized_product() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(
        nn.Linear(6, 4), FixedQuantizer(Grid(4), channel_axis=0), FixedQuantizer(Grid(4))
    ).requires_grad_(False)
    x = torch.randn(2, 40, 6) * torch.tensor([1.0, 10, 3, 0.2, 1, 1])
    scales = torch.tensor([1.0, 6, 2, 0.5, 1, 1])
    seen = Seen(100)
    for batch in x:
        seen.add(layer, (batch,))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    found = output_error(layer, seen, scales)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in state.items())
    rows, s = x.reshape(-1, 6).double().numpy(), scales.double().numpy()
    weight = layer.weight.double().numpy() * s
    moved = rounded(rows / s, (rows / s).min(), (rows / s).max(), 4)
    on_grid = rounded(weight, weight.min(1, keepdims=True), weight.max(1, keepdims=True), 4)
    expected = np.mean((moved @ on_grid.T - rows @ layer.weight.double().numpy().T) ** 2)
    assert found == pytest.approx(expected, rel=1e-4)


def test_channels_become_alike_and_the_float_output_stays(
    uneven: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
    forward: Forward,
) -> None:
    scheme = make_scheme(4, ptq4sam={}).with_overrides(ONE)
    quantized = insert_quantizers(uneven, scheme)
    with quantizer_mode(quantized, Mode.FLOAT):
        expected, before = forward(quantized), inputs_of(quantized, items)
        apply_methods(quantized, items, "before_ranges")
        found, after = forward(quantized), inputs_of(quantized, items)
    # Of the decoder none: what its MLPs read is added to what they give as well.
    assert quantized.applied["norm-scales"] == LAYERS
    for name, rows in before.items():
        # Zeros around a window are no outputs of a norm, and stay.
        sizes = rows.abs().amax(0)
        assert float(sizes.max() / sizes.min()) > 10
        alike = after[name].abs().amax(0)
        torch.testing.assert_close(alike / alike[0], torch.ones_like(alike), rtol=1e-3, atol=0)
        factor = sizes / alike
        own, theirs = (m.get_submodule(name).get_parameter("weight") for m in (quantized, uneven))
        torch.testing.assert_close(own, theirs * factor, rtol=1e-3, atol=1e-6)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_is_nearer_saved_and_switched(
    uneven: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
    forward: Forward,
    tmp_path: Path,
) -> None:
    scheme = make_scheme(4, ptq4sam={})
    without = quantize_sam(uneven, items[:2], scheme)
    quantized = quantize_sam(uneven, items[:2], scheme.with_overrides("methods=[norm-scales]"))
    assert quantized.applied["norm-scales"]
    exact = forward(uneven)[0]
    errors = [(forward(model)[0] - exact).square().mean() for model in (quantized, without)]
    assert errors[0] < 0.9 * errors[1]
    assert audit(quantized, lambda: forward(quantized)).findings == ()
    save(quantized, tmp_path / "scaled.safetensors")
    for ours, theirs in zip(
        forward(load(tmp_path / "scaled.safetensors")), forward(quantized), strict=True
    ):
        assert torch.equal(ours, theirs)
    with Switches(quantized, uneven).only(()), Switches(without, uneven).only(()):
        for ours, theirs in zip(forward(quantized), forward(without), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scales_are_found_again_where_a_norm_has_zeros() -> None:
    norm, source = nn.LayerNorm(4), nn.LayerNorm(4)
    layer = nn.Linear(4, 2)
    scales = torch.tensor([2.0, 0.5, 4.0, 8.0])
    with torch.no_grad():
        source.weight.copy_(torch.tensor([1.0, 0, 3, 0]))
        source.bias.copy_(torch.tensor([0.0, 2, 1, 0]))
        norm.load_state_dict(source.state_dict())
        fold(norm, layer, scales)
    # A channel that is always 0 has no scale.
    assert folded_scales(norm, source).tolist() == [2.0, 0.5, 4.0, 1.0]


@pytest.mark.parametrize("wanted", [0.0, 0.5])
def test_the_least_error_is_chosen_and_what_is_not_better_stays(
    wanted: float,
    uneven: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error(_layer: object, seen: Seen, scales: Tensor) -> float:
        largest = float(scales.log().abs().max() / seen.scales(1.0).log().abs().max())
        return abs(largest - wanted)

    monkeypatch.setattr(norm_scales, "output_error", error)
    quantized = insert_quantizers(uneven, make_scheme(4, ptq4sam={}, methods=["norm-scales"]))
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    sizes = inputs_of(uneven, items[:1])[LAYERS[1]].abs().amax(0)
    apply_methods(quantized, items[:1], "before_ranges")
    if wanted == 0:
        assert quantized.applied["norm-scales"] == []
        assert all(torch.equal(v, before[n]) for n, v in quantized.state_dict().items())
    else:
        expected = (sizes / sizes.log().mean().exp()).sqrt()
        weight = f"{LAYERS[1]}.weight"
        found = quantized.state_dict()[weight] / before[weight]
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-3, atol=1e-5)
    # Where no norm precedes anything.
    none = dataclasses.replace(quantized.description, normalized=())
    monkeypatch.setattr(quantized, "description", none)
    caplog.clear()
    with caplog.at_level("INFO", logger="ptq4sam.model.calibration"):
        apply_methods(quantized, items[:1], "before_ranges")
    said = [r.message for r in caplog.records if r.name.startswith("ptq4sam")]
    assert said == ["norm-scales found nothing to change"]


def test_norms_of_tiny_vit(make_scheme: MakeScheme) -> None:
    torch.manual_seed(0)
    model = build_sam("tiny_vit_nano", 64)
    with torch.no_grad():
        for module in model.image_encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight *= torch.exp(torch.randn(module.weight.shape))
    item = CalibrationItem(torch.randn(1, 3, 64, 64), torch.tensor([[4.0, 4, 40, 40]]))
    scheme = make_scheme(4, ptq4sam={}).with_overrides(ONE)
    quantized = insert_quantizers(model, scheme)
    with quantizer_mode(quantized, Mode.FLOAT), torch.no_grad():
        before = quantized.embed(item.pixels)[0]
        apply_methods(quantized, [item], "before_ranges")
        after = quantized.embed(item.pixels)[0]
    changed = quantized.applied["norm-scales"]
    norms = [n for n, m in model.image_encoder.named_modules() if isinstance(m, nn.LayerNorm)]
    assert len(changed) == len(norms) > 4
    assert {name.rpartition(".")[2] for name in changed} == {"qkv", "fc1"}
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_settings_are_checked() -> None:
    for wrong in ((), (0.0,), (1.5,)):
        with pytest.raises(ConfigError, match="allowed"):
            Strengths(strengths=wrong)


def test_units_go_elsewhere_with_their_norms(
    uneven: Sam, items: list[CalibrationItem], make_scheme: MakeScheme
) -> None:
    """As accuracy control takes them: norms with scales of another model would scale twice."""
    scheme = make_scheme(4).with_overrides(ONE)
    quantized = quantize_sam(uneven, items[:2], scheme)
    names = [name for name, _ in model_units(quantized) if name.startswith("image_encoder.")]
    levels: dict[str, int | str] = dict.fromkeys(names, "float")
    donor = insert_quantizers(uneven, scheme.with_units(levels))
    take_units(quantized, levels, donor)
    pixels = items[0].pixels
    assert torch.equal(quantized.embed(pixels)[0], donor.embed(pixels)[0])


def test_levels_of_taken_units_are_the_last_that_count(sam: Sam, make_scheme: MakeScheme) -> None:
    unit = "image_encoder.blocks.0.attn"
    scheme = make_scheme(4).with_units({unit: 5, "image_encoder": 6})
    quantized = insert_quantizers(sam, scheme)
    assert quantized.level_of(unit) == 6
    take_units(quantized, {unit: 8}, insert_quantizers(sam, make_scheme(8)))
    assert quantized.level_of(unit) == 8
