from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.bimodal import integrate_bimodal
from ptq4sam.model import calibration
from ptq4sam.model.calibrated import CalibratedState
from ptq4sam.model.calibration import CalibrationItem, calibrate, run_item
from ptq4sam.model.insertion import TRANSFORMER, insert_quantizers, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.observers import OBSERVERS
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.transformer import Attention

Forward = Callable[[Sam], tuple[Tensor, ...]]
MakeScheme = Callable[..., Scheme]
Items = list[CalibrationItem]


def decoder_attentions(sam: Sam) -> dict[str, Attention]:
    """The attentions of the mask decoder, by their path in its transformer."""
    modules = sam.mask_decoder.transformer.named_modules()
    return {name: module for name, module in modules if isinstance(module, Attention)}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_more_bits_come_closer_to_the_float_model(
    sam: Sam, items: Items, make_scheme: MakeScheme, forward: Forward
) -> None:
    expected = forward(sam)[0]
    schemes = [make_scheme(bits) for bits in (3, 5, 8)]
    searched = [one.with_overrides("w_qconfig.observer=MSEObserver") for one in schemes]
    errors = [error(forward(quantize_sam(sam, items, one))[0], expected) for one in searched]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_reconstruction_lowers_the_error_of_units(
    sam: Sam, items: Items, make_scheme: MakeScheme, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="ptq4sam.model.engine"):
        quantize_sam(sam, items, make_scheme(3, steps=150, recon={"rounding_lr": 0.01}))
    told = [r.args for r in caplog.records if r.message.startswith("reconstructed")]
    assert len(told) == 2 * 2 + 1 + 2 * 4 + 1
    before, after = (sum(float(args[place]) for args in told) for place in (1, 2))  # type: ignore[index,arg-type]
    assert after < 0.9 * before


def test_several_pictures_a_step(
    sam: Sam, items: Items, make_scheme: MakeScheme, caplog: pytest.LogCaptureFixture
) -> None:
    recon = {"rounding_lr": 0.01, "batch_size": 3}
    with caplog.at_level("INFO", logger="ptq4sam.model.engine"):
        quantize_sam(sam, items, make_scheme(3, steps=60, recon=recon))
    told = [r.args for r in caplog.records if r.message.startswith("reconstructed")]
    before, after = (sum(float(args[place]) for args in told) for place in (1, 2))  # type: ignore[index,arg-type]
    assert after < 0.95 * before


def test_many_boxes_go_in_groups(
    sam: Sam, items: Items, make_scheme: MakeScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BOXES_AT_ONCE", 2)
    seen: list[int] = []
    attention = sam.mask_decoder.transformer.final_attn_token_to_image
    attention.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    run_item(sam, items[2])
    assert len(items[2].boxes) == 3
    assert seen == [2, 1]
    quantize_sam(sam, items, make_scheme(4, steps=2))


def test_same_seed_same_bits_and_another_seed_others(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    scheme = make_scheme(4, steps=5, recon={"rounding_lr": 0.2})
    first, second, third = (
        quantize_sam(sam, items, scheme, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_global_random_state_does_not_matter(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    torch.manual_seed(5)
    first = quantize_sam(sam, items, make_scheme(4, steps=5)).state_dict()
    torch.manual_seed(6)
    second = quantize_sam(sam, items, make_scheme(4, steps=5)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layer_by_layer_reconstruction_visits_every_layer(
    sam: Sam, items: Items, make_scheme: MakeScheme, caplog: pytest.LogCaptureFixture
) -> None:
    recon = {"granularity": "layer", "weights_only": True}
    with caplog.at_level("INFO", logger="ptq4sam.model.engine"):
        quantized = quantize_sam(sam, items, make_scheme(4, steps=2, recon=recon))
    told = [r.args[0] for r in caplog.records if r.message.startswith("reconstructed")]  # type: ignore[index]
    assert len(told) == len(set(told)) == len(quantized_layers(quantized))


def test_bimodal_folding_leaves_the_float_output(
    sam: Sam, items: Items, make_scheme: MakeScheme, forward: Forward
) -> None:
    """Force two peaks on every key of the decoder, one channel wholly in one of them."""
    for attention in decoder_attentions(sam).values():
        bias = attention.k_proj.bias
        sign = torch.where(torch.arange(len(bias)) % 2 == 0, 1.0, -1.0)
        bias.data.copy_(12 * sign)
    expected = forward(sam)
    quantized = insert_quantizers(sam, make_scheme())
    with quantizer_mode(quantized, Mode.FLOAT):
        folded = integrate_bimodal(
            quantized.foldable(),
            quantized.scheme.ptq4sam.bimodal,
            lambda: run_item(quantized, items[0]),
        )
        found = forward(quantized)
    assert folded == [
        "layers.0.cross_attn_token_to_image",
        "layers.1.cross_attn_token_to_image",
        "final_attn_token_to_image",
    ]
    for name, attention in decoder_attentions(quantized).items():
        assert bool((attention.k_proj.bias > 0).all()) == (name in folded), name
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("BIG", [True, False])
def test_bimodal_keys_have_an_observer_of_their_own(
    sam: Sam, items: Items, make_scheme: MakeScheme, BIG: bool
) -> None:
    """With bimodal integration all keys of the decoder are observed by AvgMSEFast, nothing else."""
    quantized = insert_quantizers(sam, make_scheme(ptq4sam={"BIG": BIG, "AGQ": False}))
    seen: dict[str, list[Tensor]] = {}
    activations = {
        name: quantizer
        for name, quantizer in quantizers(quantized)
        if not name.endswith("weight_quantizer")
    }
    calibrate(quantized, items)
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _quantizer, inputs, name=name: seen.setdefault(name, []).append(inputs[0])
        )
        for name, quantizer in activations.items()
    ]
    with quantizer_mode(quantized, Mode.FLOAT):
        for item in items:
            run_item(quantized, item)
    for handle in handles:
        handle.remove()
    keys = {f"{TRANSFORMER}.{name}.core.key_quantizer" for name in decoder_attentions(sam)}
    assert keys < set(activations)
    for name, quantizer in activations.items():
        kind = "AvgMSEFastObserver" if BIG and name in keys else "AvgMinMaxObserver"
        observer = OBSERVERS[kind](quantizer.grid)
        for batch in seen[name]:
            observer.observe(batch)
        scale, zero_point = observer.quantization_parameters()
        torch.testing.assert_close(quantizer.scale.detach(), scale, rtol=1e-3, atol=0, msg=name)
        assert quantizer.zero_point == zero_point, name


def test_calibration_without_pictures_is_refused(sam: Sam, make_scheme: MakeScheme) -> None:
    with pytest.raises(CalibrationError, match="at least 1 picture"):
        quantize_sam(sam, [], make_scheme())


def test_non_finite_picture_names_the_quantizer(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    bad = CalibrationItem(torch.full_like(items[0].pixels, float("nan")), items[0].boxes)
    scheme = make_scheme(ptq4sam={"BIG": False, "AGQ": True})
    with pytest.raises(CalibrationError, match="image_encoder"):
        quantize_sam(sam, [items[0], bad], scheme)


def test_modes_are_back_after_quantization(sam: Sam, items: Items, make_scheme: MakeScheme) -> None:
    quantized = quantize_sam(sam, items, make_scheme(4, steps=2))
    for _, quantizer in quantizers(quantized):
        assert quantizer.mode is Mode.QUANTIZE
        assert quantizer.drop_probability == 0
        assert not any(p.requires_grad for p in quantizer.parameters())
    for _, unit in model_units(quantized):
        assert not unit._forward_hooks


def test_a_calibration_from_a_file_says_what_methods_changed(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path
) -> None:
    scheme = make_scheme(methods=["key-centring"])
    calibrated = insert_quantizers(sam, scheme)
    calibrate(calibrated, items[:1])
    assert calibrated.applied["key-centring"]
    CalibratedState.of(calibrated, sam).save(tmp_path / "calibrated.safetensors")
    restored = insert_quantizers(sam, scheme)
    CalibratedState.load(tmp_path / "calibrated.safetensors").restore(restored)
    assert restored.applied == calibrated.applied
