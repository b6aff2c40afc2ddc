"""A grid that is not even goes the whole way: calibrated, learned, audited, saved, reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import ConfigError
from ptq4sam.methods.hybrid import HybridQuantizer
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.distributions import observe_distributions
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
MakeScheme = Callable[..., Scheme]

SLOTS = {"input@after-gelu": {"grid": "hybrid"}, "input@after-relu": {"grid": "hybrid"}}


def hybrids(sam: Sam) -> dict[str, HybridQuantizer]:
    return {name: q for name, q in quantizers(sam) if isinstance(q, HybridQuantizer)}


def scheme_of(make_scheme: MakeScheme, steps: int = 0, **more: object) -> Scheme:
    return make_scheme(4, steps, **{"slots": SLOTS, **more})


@pytest.fixture
def quantized(quantize: Callable[..., QuantizedSam]) -> QuantizedSam:
    return quantize(slots=SLOTS)


def test_it_sits_behind_activations_alone(quantized: QuantizedSam) -> None:
    assert list(hybrids(quantized)) == [
        f"{part}.mlp.lin2.input_quantizer"
        for part in (
            "image_encoder.blocks.0",
            "image_encoder.blocks.1",
            "mask_decoder.transformer.layers.0",
            "mask_decoder.transformer.layers.1",
        )
    ]


def test_the_search_sees_the_weight(
    quantized: QuantizedSam, sam: Sam, items: list[CalibrationItem], make_scheme: MakeScheme
) -> None:
    """Another weight behind it gives other errors; the errors are those of the layer's output."""
    name = "image_encoder.blocks.0.mlp.lin2"
    seen: list[Tensor] = []
    layer = sam.get_submodule(name)
    handle = layer.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0]))
    for item in items[:2]:
        sam.image_encoder(item.pixels)
    handle.remove()
    alone = HybridQuantizer(quantized.get_submodule(f"{name}.input_quantizer").grid)
    for x in seen:
        alone.observe(x.detach(), layer.weight.detach().t())
    found = hybrids(quantized)[f"{name}.input_quantizer"]
    assert found._errors == pytest.approx(alone._errors, rel=0.01)
    assert float(found.scale) == pytest.approx(float(alone.scale), rel=1e-5)


def test_the_audit_passes_and_finds_points_that_are_none(
    quantized: QuantizedSam, forward: Forward
) -> None:
    assert audit(quantized, lambda: forward(quantized)).findings == ()
    name, quantizer = next(iter(hybrids(quantized).items()))
    with torch.no_grad():
        quantizer.logarithmic.fill_(15)
    told = [str(found) for found in audit(quantized, lambda: forward(quantized)).findings]
    assert any(
        "has 15 logarithmic codes, expected 1 to 14" in line and name in line for line in told
    )


def test_the_audit_finds_another_grid_than_the_schemes(
    quantized: QuantizedSam,
    sam: Sam,
    items: list[CalibrationItem],
    forward: Forward,
    make_scheme: MakeScheme,
) -> None:
    even = quantize_sam(sam, items[:2], scheme_of(make_scheme, slots={}))
    even.scheme = quantized.scheme
    told = [found.problem for found in audit(even, lambda: forward(even)).findings]
    assert told.count("is of LSQQuantizer where the scheme says HybridQuantizer") == 4


def test_a_file_gives_the_same_bits(
    quantized: QuantizedSam, forward: Forward, tmp_path: Path
) -> None:
    save(quantized, tmp_path / "hybrid.safetensors")
    loaded = load(tmp_path / "hybrid.safetensors")
    assert loaded.scheme == quantized.scheme
    for ours, theirs in zip(forward(loaded), forward(quantized), strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_learned(
    quantized: QuantizedSam, quantize: Callable[..., QuantizedSam], forward: Forward
) -> None:
    before, after = quantized, quantize(4, 10, slots=SLOTS, recon={"scale_lr": 0.01})
    moved = [
        [float(a) != float(b) for a, b in zip(one.learned(), other.learned(), strict=True)]
        for one, other in zip(hybrids(before).values(), hybrids(after).values(), strict=True)
    ]
    assert any(any(pair) for pair in moved)
    assert audit(after, lambda: forward(after)).findings == ()


def test_the_same_bits_with_and_without_whole_numbers(
    quantized: QuantizedSam, items: list[CalibrationItem]
) -> None:
    """Products of whole steps are those of values, as far as float32 goes."""
    layer = quantized.get_submodule("image_encoder.blocks.0.mlp.lin2")
    x = torch.nn.functional.gelu(torch.randn(3, 50, layer.weight.shape[1]))
    with torch.no_grad():
        whole = layer(x)
        moved = layer.input_quantizer(x)
        expected = moved.double() @ layer.weight_quantizer(layer.weight).double().t() + layer.bias
    np.testing.assert_allclose(whole.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert float((moved - x).abs().mean()) > 1e-3


def test_reports_know_its_range(
    quantized: QuantizedSam, sam: Sam, items: list[CalibrationItem]
) -> None:
    found = observe_distributions(sam, quantized, items[0])
    for name, quantizer in hybrids(quantized).items():
        layer = next(one for one in found.layers if f"{one.name}.input_quantizer" == name)
        points = quantizer(torch.linspace(-100, 100, 10_001)).detach()
        assert layer.range.low == pytest.approx(float(points.min()), abs=1e-5)
        assert layer.range.high == pytest.approx(float(points.max()), rel=1e-5)


def test_reports_know_the_points_of_a_hybrid_softmax(
    sam: Sam, items: list[CalibrationItem], make_scheme: MakeScheme
) -> None:
    scheme = scheme_of(make_scheme, slots={"softmax": {"grid": "hybrid"}})
    quantized = quantize_sam(sam, items[:2], scheme)
    found = observe_distributions(sam, quantized, items[0])
    for attention in found.attentions:
        quantizer = quantized.get_submodule(f"{attention.name}.core.softmax_quantizer")
        points = quantizer(torch.linspace(0, 1, 100_001)).unique().detach()
        levels = sorted(2**level for level in attention.softmax.levels())
        np.testing.assert_allclose(points[points > 0].numpy(), levels, rtol=1e-4)


def test_a_role_that_the_model_has_not_is_refused(sam: Sam, make_scheme: MakeScheme) -> None:
    scheme = make_scheme(4, slots={"input@after-gelo": {"grid": "hybrid"}})
    with pytest.raises(ConfigError, match=r"after-gelo: unknown key; did you mean 'after-gelu'"):
        insert_quantizers(sam, scheme)
