"""Keys without their means: the same attention, narrower grids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.model.calibration import CalibrationItem, apply_methods, run_item
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
MakeScheme = Callable[..., Scheme]
DECODER = "mask_decoder.transformer.layers.0.cross_attn_image_to_token"
ENCODER = "image_encoder.blocks.0.attn"


@pytest.fixture
def off_centre(sam: Sam) -> Sam:
    """Keys far from zero, each channel elsewhere."""
    with torch.no_grad():
        for name, module in sam.named_modules():
            if name.endswith("k_proj"):
                module.bias += 5 * torch.randn(module.bias.shape)
            elif name.endswith("attn.qkv"):
                width = len(module.bias) // 3
                module.bias[width : 2 * width] += 5 * torch.randn(width)
    return sam


def keys_of(model: Sam, items: list[CalibrationItem]) -> dict[str, Tensor]:
    """Rows of keys of an attention of either network."""
    found: dict[str, list[Tensor]] = {DECODER: [], ENCODER: []}

    def keep(name: str, output: Tensor) -> None:
        width = output.shape[-1] // 3
        keys = output[..., width : 2 * width] if name == ENCODER else output
        found[name].append(keys.detach().flatten(0, -2))

    layers: dict[str, nn.Module] = {
        DECODER: model.get_submodule(f"{DECODER}.k_proj"),
        ENCODER: model.get_submodule(f"{ENCODER}.qkv"),
    }
    handles = [
        layer.register_forward_hook(lambda _l, _i, output, name=name: keep(name, output))
        for name, layer in layers.items()
    ]
    for item in items:
        run_item(model, item)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_means_go_and_the_float_output_stays(
    off_centre: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
    forward: Forward,
) -> None:
    quantized = insert_quantizers(off_centre, make_scheme(4, methods=["key-centring"], ptq4sam={}))
    with quantizer_mode(quantized, Mode.FLOAT):
        expected, before = forward(quantized), keys_of(quantized, items)
        apply_methods(quantized, items, "before_ranges")
        found, after = forward(quantized), keys_of(quantized, items)
    changed = quantized.applied["key-centring"]
    # Both networks' attentions, each once.
    assert f"{ENCODER}.qkv" in changed
    assert f"{DECODER}.k_proj" in changed
    assert len(changed) == 2 + 7
    for name, keys in before.items():
        assert float(keys.mean(0).abs().max()) > 1
        torch.testing.assert_close(
            after[name].mean(0), torch.zeros(keys.shape[1]), rtol=0, atol=1e-3
        )
        # Nothing but the mean.
        torch.testing.assert_close(after[name], keys - keys.mean(0), rtol=0, atol=1e-3)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def test_units_that_stay_float_stay_as_they_are(
    off_centre: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
) -> None:
    units = {ENCODER: "float", DECODER: "float"}
    scheme = make_scheme(4, methods=["key-centring"], ptq4sam={}, units=units)
    quantized = insert_quantizers(off_centre, scheme)
    apply_methods(quantized, items[:1], "before_ranges")
    changed = quantized.applied["key-centring"]
    assert len(changed) == 2 + 7 - len(units)
    for unit, layer in ((ENCODER, "qkv"), (DECODER, "k_proj")):
        assert f"{unit}.{layer}" not in changed
        ours, theirs = (m.get_submodule(f"{unit}.{layer}") for m in (quantized, off_centre))
        assert torch.equal(ours.get_parameter("bias"), theirs.get_parameter("bias"))


def test_grids_of_keys_become_narrower(
    off_centre: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
) -> None:
    scheme = make_scheme(6, ptq4sam={})
    scales = []
    for given in (scheme, scheme.with_overrides("methods=[key-centring]")):
        quantized = quantize_sam(off_centre, items[:2], given)
        found = dict(quantizers(quantized))
        scales.append([q.scale.item() for n, q in found.items() if n.endswith("key_quantizer")])
    assert len(scales[0]) == 2 + 7
    assert all(after < before for before, after in zip(*scales, strict=True))
    assert sum(scales[1]) < 0.7 * sum(scales[0])
