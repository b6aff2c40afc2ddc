"""Units at other bits, or float: inserted, exchanged, audited, and kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import ConfigError
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.exchange import exchanged, take_units
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
Quantize = Callable[..., QuantizedSam]

ATTENTION = "image_encoder.blocks.1.attn"
MLP = "mask_decoder.transformer.layers.0.mlp"
UNITS = {
    ATTENTION: "float",
    MLP: 8,
    "image_encoder.neck": 6,
    "mask_decoder.transformer.final_attn_token_to_image": "float",
}


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def bits_of(sam: QuantizedSam, unit: str) -> set[int]:
    return {quantizer.grid.bits for _, quantizer in quantizers(sam.get_submodule(unit))}


def test_units_have_the_bits_that_the_scheme_says(quantize: Quantize, forward: Forward) -> None:
    sam = quantize(units=UNITS)
    for name, _ in model_units(sam):
        level = UNITS.get(name, 4)
        assert bits_of(sam, name) == (set() if level == "float" else {level}), name
    report = audit(sam, lambda: forward(sam))
    assert report.passed, report.lines()
    assert dict(report.kept) == UNITS
    told = "\n".join(report.lines())
    assert f"{ATTENTION}: kept float by the scheme" in told
    assert f"{MLP}: kept at 8 bits by the scheme" in told


def test_reconstruction_passes_by_float_units(quantize: Quantize, forward: Forward) -> None:
    sam = quantize(steps=2, units=UNITS)
    assert audit(sam, lambda: forward(sam)).passed


def test_a_file_keeps_the_units(quantize: Quantize, forward: Forward, tmp_path: Path) -> None:
    sam = quantize(units=UNITS)
    save(sam, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.scheme.units == UNITS
    assert same(forward(sam), forward(again))
    assert audit(again, lambda: forward(again)).passed


def test_a_float_unit_gives_the_float_answer(
    sam: Sam, items: list[CalibrationItem], make_scheme: Callable[..., Scheme], forward: Forward
) -> None:
    names = [name for name, _ in model_units(insert_quantizers(sam, make_scheme()))]
    scheme = make_scheme(units=dict.fromkeys(names, "float"))
    # But for last bits: what lies between its units is portable.
    found = forward(quantize_sam(sam, items[:1], scheme))
    torch.testing.assert_close(found, forward(sam), rtol=1e-4, atol=1e-4)


def test_the_audit_finds_bits_that_the_scheme_does_not_say(
    quantize: Quantize, forward: Forward
) -> None:
    sam = quantize()
    said = sam.scheme
    sam.scheme = said.with_units({ATTENTION: "float", MLP: 8})
    told = "\n".join(audit(sam, lambda: forward(sam)).lines())
    assert f"{ATTENTION}.qkv.weight_quantizer: has 4 bits where the scheme says float" in told
    assert f"{MLP}.lin1.input_quantizer: has 4 bits where the scheme says 8 bits" in told
    kept = quantize(units={ATTENTION: "float"})
    kept.scheme = said
    told = "\n".join(audit(kept, lambda: forward(kept)).lines())
    assert f"{ATTENTION}.qkv: is listed as quantized but is a float operator" in told
    assert f"{ATTENTION}.core: is listed as quantized but is a float operator" in told


def test_exchanged_units_come_back(quantize: Quantize, forward: Forward) -> None:
    low, high = quantize(4), quantize(8)
    before = forward(low)
    units = dict(model_units(high))
    with exchanged(low, {MLP: units[MLP], "image_encoder.neck": units["image_encoder.neck"]}):
        assert bits_of(low, MLP) == {8}
        assert not same(forward(low), before)
    with exchanged(low, units):
        assert same(forward(low), forward(high))
    assert bits_of(low, MLP) == {4}
    assert same(forward(low), before)


def test_units_that_are_taken_are_those_of_a_model_made_so(
    quantize: Quantize, forward: Forward, tmp_path: Path
) -> None:
    sam = quantize(4)
    take_units(sam, {MLP: 8}, quantize(8))
    made = quantize(4, units={MLP: 8})
    assert sam.scheme == made.scheme
    assert same(forward(sam), forward(made))
    take_units(sam, {ATTENTION: "float"}, quantize(4, units={ATTENTION: "float"}))
    made = quantize(4, units={MLP: 8, ATTENTION: "float"})
    assert sam.scheme == made.scheme
    assert sam.state_dict().keys() == made.state_dict().keys()
    save(sam, tmp_path / "model.safetensors")
    assert same(forward(load(tmp_path / "model.safetensors")), forward(sam))
    assert audit(sam, lambda: forward(sam)).passed


def test_signs_are_not_said_to_be_folded_in_a_float_unit(quantize: Quantize) -> None:
    sam = quantize(4)
    sam.folded = ["layers.0.cross_attn_token_to_image", "final_attn_token_to_image"]
    name = "mask_decoder.transformer.final_attn_token_to_image"
    take_units(sam, {name: "float"}, quantize(4, units={name: "float"}))
    assert sam.folded == ["layers.0.cross_attn_token_to_image"]


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ({"image_encoder.nek": 8}, r"units.image_encoder.nek: unknown key; did you mean 'image_"),
        ({"image_encoder.neck": 1}, r"units.image_encoder.neck: 1 given, allowed: 2 to 16"),
        ({"image_encoder.neck": "half"}, r"units.image_encoder.neck: 'half' given"),
        ({"image_encoder.neck": "w4a1"}, r"units.image_encoder.neck: w4a1 given, allowed: 2 to 16"),
        ({"image_encoder.neck": True}, r"True given, an integer or text is needed"),
        ([8], "names and values are needed"),
    ],
)
def test_impossible_units_are_told(
    sam: Sam, make_scheme: Callable[..., Scheme], units: object, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        insert_quantizers(sam, make_scheme(units=units))
    assert "\n" not in str(caught.value)


def test_units_of_a_float_encoder_are_none(sam: Sam, make_scheme: Callable[..., Scheme]) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        insert_quantizers(sam, make_scheme(units={"image_encoder.neck": 8}), quantize_encoder=False)


def test_units_are_read_and_written(make_scheme: Callable[..., Scheme], tmp_path: Path) -> None:
    scheme = make_scheme(units=UNITS)
    (tmp_path / "scheme.yaml").write_text(scheme.to_yaml())
    assert Scheme.from_yaml(tmp_path / "scheme.yaml") == scheme
    assert scheme.with_overrides("units={image_encoder.neck: 8}").units == {"image_encoder.neck": 8}
    assert scheme.of_unit(ATTENTION) is None
    assert scheme.of_unit("image_encoder.blocks.0.mlp") == make_scheme()
    assert scheme.of_unit(MLP) == make_scheme(8)
