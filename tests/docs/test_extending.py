"""The examples of extending.md do what the page says of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4sam import families
from ptq4sam.errors import ConfigError
from ptq4sam.families import build_sam
from ptq4sam.methods.method import Calibration
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, calibrate, run_decoder
from ptq4sam.model.insertion import insert_quantizers, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import activation_slots
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.registry import METHODS, OBSERVERS, QUANTIZERS
from ptq4sam.quantization.scheme import Scheme
from tests.docs.pages import blocks
from tests.tiny_runs import REPOSITORY, SCHEMES


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the page's files define; forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("plain_encoder", "plain_sam"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(families, "VARIANTS", dict(families.VARIANTS))
    for registry in (OBSERVERS, QUANTIZERS, METHODS):
        # Those of ours that were not imported yet would be forgotten with the examples.
        assert all(registry[name] for name in registry.names)
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks(REPOSITORY / "docs" / "extending.md"):
        if block.language == "python" and block.file is not None:
            assert len(block.text.splitlines()) <= 44
            (tmp_path / block.file).write_text(block.text)
            exec(compile(block.text, "example", "exec", dont_inherit=True), names)
    return names


def test_observer(examples: dict[str, Any]) -> None:
    rows = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    rows[0, 0] = 50.0
    low, high = OBSERVERS["StdObserver"](Grid(4), 0).batch_range(rows)
    deviation = rows.double().std(dim=1, correction=0)
    assert high[0].item() == pytest.approx(
        rows[0].mean().item() + 4 * deviation[0].item(), rel=1e-4
    )
    assert low[1].item() == pytest.approx(max(rows[1].min().item(), -4 * 1.02), abs=0.2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantizer(examples: dict[str, Any], symmetric: bool) -> None:
    quantizer = QUANTIZERS["PowerOfTwoFakeQuantize"](Grid(6, symmetric), "MinMaxObserver", 0)
    x = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)) + 0.5
    with quantizer_mode(quantizer, Mode.OBSERVE):
        quantizer(x)
    assert torch.equal(torch.log2(quantizer.scale), torch.log2(quantizer.scale).round())
    # Nothing is clipped: every value is within half a step.
    assert bool(((quantizer(x) - x).abs() <= 0.5001 * quantizer.scale[:, None]).all())


def test_method(examples: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sam = insert_quantizers(
        build_sam("vit_nano").eval(), Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml"), False
    )
    item = CalibrationItem(torch.randn(1, 3, 256, 256), torch.tensor([[20.0, 30.0, 90.0, 120.0]]))
    kept: list[torch.Tensor] = []
    final = sam.mask_decoder.transformer.final_attn_token_to_image
    final.register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
    features = torch.randn(1, 128, 32, 32)
    before = final.v_proj.weight.clone()
    kind = METHODS["value-equalization"]
    calibration = Calibration(sam, [item], lambda item: run_decoder(sam, features, item.boxes))
    with quantizer_mode(sam, Mode.FLOAT), torch.no_grad():
        run_decoder(sam, features, item.boxes)
        changed = kind(kind.settings_type()).before_ranges(calibration)
        run_decoder(sam, features, item.boxes)
    assert "transformer.final_attn_token_to_image" in changed
    assert not torch.equal(final.v_proj.weight, before)
    torch.testing.assert_close(kept[-1], kept[0], rtol=1e-4, atol=1e-5)


def test_method_that_sets_ranges(examples: dict[str, Any]) -> None:
    sam = insert_quantizers(
        build_sam("vit_nano").eval(), Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml"), True
    )
    torch.manual_seed(0)
    item = CalibrationItem(torch.randn(1, 3, 256, 256), torch.tensor([[20.0, 30.0, 90.0, 120.0]]))
    calibrate(sam, [item])
    before = {
        path: affine.parameters_in_use()
        for path, quantizer in activation_slots(sam)
        if (affine := quantizer.as_affine()) is not None
    }
    kind = METHODS["clip-share"]
    calibration = Calibration(sam, [item], lambda _item: None)
    changed = kind(kind.settings_type.from_dict({"share": 0.5})).after_ranges(calibration)
    # All but softmax, whose grid is not even.
    assert set(changed) == set(before)
    assert 0 < len(changed) < len(list(activation_slots(sam)))
    for path, quantizer in activation_slots(sam):
        if path in before:
            scale, zero_point = quantizer.as_affine().parameters_in_use()
            assert torch.equal(scale, 0.5 * before[path][0])
            assert torch.equal(zero_point, before[path][1])
    with pytest.raises(ConfigError, match=r"share: 2\.0 given, allowed: above 0, up to 1"):
        kind.settings_type.from_dict({"share": 2})


@torch.no_grad()
def test_family(examples: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sam = build_sam("plain")
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 50.0]])
    item = CalibrationItem(torch.randn(1, 3, 64, 64), boxes)
    quantized = quantize_sam(sam, [item], Scheme.from_yaml(SCHEMES / "w8a8.yaml"))

    def forward() -> tuple[torch.Tensor, ...]:
        features = quantized.embed(item.pixels)
        return (*features, *quantized.decode(features, None, boxes, None, True))

    report = audit(quantized, forward)
    assert report.passed, "\n".join(report.lines())
    assert [name for name, _ in model_units(quantized)][:3] == [
        f"image_encoder.{unit}" for unit in ("blocks.0", "blocks.1", "norm")
    ]
    expected = sam.embed(item.pixels)[0]
    assert (forward()[0] - expected).norm() < 0.05 * expected.norm()
