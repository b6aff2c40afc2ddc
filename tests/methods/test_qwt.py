"""Corrections of outputs against a line fitted channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import ConfigError
from ptq4sam.methods.qwt import OutputMoments, fold_affine
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.model.switches import Switches
from ptq4sam.operators.base import observe_weights, put_weights_on_grid, quantized_layers
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.affine import AffineQuantizer, FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import LSQPlusQuantizer, LSQQuantizer, Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]


def outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of a float layer and of a quantized one, of which each channel is off in its own way."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(500, 4, generator=generator) + torch.tensor([0.0, 1.0, -2.0, 5.0])
    slope, shift = torch.tensor([1.1, 0.8, 1.0, 0.95]), torch.tensor([0.3, 0.0, -0.2, 0.1])
    noise = 0.2 * torch.randn(500, 4, generator=generator)
    return exact, exact * slope + shift + noise


def test_factors_and_summands_are_those_of_a_fitted_line() -> None:
    exact, found = outputs()
    moments = OutputMoments.of(4, exact.device)
    for part in (slice(0, 120), slice(120, 500)):
        moments.add(exact[part], found[part])
    factor, summand = moments.affine(0.5)
    for channel in range(4):
        line = np.polyfit(found[:, channel].double(), exact[:, channel].double(), 1)
        assert (float(factor[channel]), float(summand[channel])) == pytest.approx(line, rel=1e-6)
    plain = ((found.double() * factor + summand - exact.double()) ** 2).mean(0)
    torch.testing.assert_close(moments.error(factor, summand), plain, rtol=1e-6, atol=1e-9)
    # Far factors are cut, and a channel that does not vary has none.
    assert float(moments.affine(0.05)[0].max()) <= 1.05
    still = OutputMoments.of(4, exact.device)
    still.add(exact, torch.ones_like(found))
    factor, summand = still.affine(0.5)
    assert torch.equal(factor, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(summand, exact.double().mean(0) - 1)


@pytest.mark.parametrize("kind", [FixedQuantizer, LSQQuantizer, LSQPlusQuantizer])
def test_folding_leaves_codes_and_changes_the_output_as_said(kind: type[AffineQuantizer]) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(8, 4), kind(Grid(4), channel_axis=0), FixedQuantizer(Grid(8)))
    x = torch.randn(50, 8)
    observe_weights(layer)
    with quantizer_mode(layer.input_quantizer, Mode.OBSERVE):
        layer.input_quantizer(x)
    layer.requires_grad_(False)
    put_weights_on_grid(layer)
    codes, before = layer.weight_quantizer.codes(layer.weight), layer(x)
    factor, summand = torch.tensor([0.9, 1.2, 1.0, 0.7]), torch.tensor([0.1, 0.0, -3.0, 2.0])
    with torch.no_grad():
        fold_affine(layer, factor, summand)
    torch.testing.assert_close(layer(x), before * factor + summand, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes)
    assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_is_corrected_saved_and_nearer_to_the_float_one(
    steps: int,
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
    tmp_path: Path,
) -> None:
    scheme = make_scheme(4, steps, methods=["qwt-v2"], ptq4sam={"AGQ": True})
    quantized = quantize_sam(sam, items[:2], scheme)
    without = quantize_sam(sam, items[:2], scheme.with_overrides("methods=[]"))
    changed = quantized.applied["qwt-v2"]
    assert "image_encoder.blocks.0.mlp.lin1" in changed
    # On the inputs of the float model, which is what each is corrected for.
    for name in changed:
        errors = dict.fromkeys(("with", "without"), 0.0)

        def compare(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for model, key in ((quantized, "with"), (without, "without")):
                found = model.get_submodule(name)(inputs[0])  # noqa: B023
                errors[key] += float((found - output).square().mean())  # noqa: B023

        handle = sam.get_submodule(name).register_forward_hook(compare)
        for item in items[:2]:
            run_item(sam, item)
        handle.remove()
        assert errors["with"] < errors["without"] * 1.001, name
    assert audit(quantized, lambda: forward(quantized)).findings == ()
    save(quantized, tmp_path / "corrected.safetensors")
    loaded = load(tmp_path / "corrected.safetensors")
    for ours, theirs in zip(forward(loaded), forward(quantized), strict=True):
        assert torch.equal(ours, theirs)
    codes = [
        [q.weight_quantizer.codes(q.weight) for _, q in quantized_layers(model)]
        for model in (quantized, without)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_what_a_correction_would_make_wrong_is_refused(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
) -> None:
    scheme = make_scheme(4, methods=["qwt-v2"])
    with pytest.raises(ConfigError, match=r"asked for qwt-v2 with compat: published"):
        quantize_sam(sam, items[:2], scheme.with_overrides("compat=published"))
    # Its summands are in biases: with all quantizers off it is not the float model.
    corrected = quantize_sam(sam, items[:2], scheme)
    with pytest.raises(ConfigError, match="a model that qwt-v2 corrected after reconstruction"):
        Switches(corrected, sam)


def test_places_of_an_upscaled_square_have_factors_of_their_own(
    sam: Sam, items: list[CalibrationItem], make_scheme: Callable[..., Scheme]
) -> None:
    scheme = make_scheme(4, methods=["qwt-v2"], upscaling="quantized")
    quantized = quantize_sam(sam, items[:2], scheme)
    upscaling = [name for name in quantized.applied["qwt-v2"] if "upscaling" in name]
    assert upscaling == [f"mask_decoder.output_upscaling.{place}" for place in (0, 3)]
    plain = quantize_sam(sam, items[:2], scheme.with_overrides("methods={}"))
    for name in upscaling:
        one, other = (model.get_submodule(name) for model in (quantized, plain))
        ratio = one.get_buffer("weight_quantizer.scale") / other.get_buffer(
            "weight_quantizer.scale"
        )
        assert len(ratio.unique()) > len(ratio) // 4
