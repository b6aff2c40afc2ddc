"""`compat: published`: the defects of a unit are there from its end on, and feed the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.methods import reconstruction
from ptq4sam.methods.reconstruction import UnitData, UnitLosses, reconstruct_unit
from ptq4sam.model import engine
from ptq4sam.model.calibration import CalibrationItem, calibrate, run_item
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.journal import Journal
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

MakeScheme = Callable[..., Scheme]
Items = list[CalibrationItem]


def quick(make_scheme: MakeScheme, compat: str = "published", **recon: object) -> Scheme:
    """A scheme whose calibration searches nothing."""
    recon = {"rounding_lr": 0.05, **recon}
    return make_scheme(4, steps=2, ptq4sam={}, recon=recon, compat=compat)


def defects(unit: nn.Module) -> list[tuple[float, str]]:
    """Probability of dropping, and rounding, of each layer."""
    return [
        (layer.input_quantizer.drop_probability, layer.weight_quantizer.rounding)
        for _, layer in quantized_layers(unit)
    ]


def published(unit: nn.Module) -> list[tuple[float, str]]:
    return [(0.5, "soft" if index else "hard") for index in range(len(quantized_layers(unit)))]


def arguments_of(sam: QuantizedSam, unit: nn.Module, items: Items) -> list[tuple[Tensor, ...]]:
    """What a unit gets from those before it, which draw from the start again."""
    for _, quantizer in quantizers(sam):
        if quantizer.generator is not None:
            quantizer.generator.manual_seed(quantizer.generator.initial_seed())
    seen: list[tuple[Tensor, ...]] = []
    handle = unit.register_forward_pre_hook(lambda _unit, inputs: seen.append(inputs))
    for item in items:
        run_item(sam, item)
    handle.remove()
    return seen


def test_defects_of_a_unit_feed_the_units_behind_it(
    sam: Sam, items: Items, make_scheme: MakeScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails, as was tried, where the defects are added after the last unit only."""
    scheme = quick(make_scheme)
    ours, items = insert_quantizers(sam, scheme), items[:2]
    calibrate(ours, items)
    done: list[nn.Module] = []

    def check(
        name: str, unit: nn.Module, weights: Any, given: UnitData, *rest: Any, **more: Any
    ) -> UnitLosses:
        assert [defects(before) for before in done] == [published(before) for before in done]
        assert {*defects(unit)} == {(0.0, "nearest")}
        expected = arguments_of(ours, unit, items)
        torch.testing.assert_close(list(given.inputs), expected, rtol=1e-4, atol=1e-5)
        done.append(unit)
        return reconstruct_unit(name, unit, weights, given, *rest, **more)

    monkeypatch.setattr(engine, "reconstruct_unit", check)
    assert scheme.recon is not None
    engine.reconstruct(ours, items, scheme.recon)
    assert done == [unit for _, unit in model_units(ours)]


def test_weights_only_learns_without_dropping_and_evaluates_with_it(
    sam: Sam, items: Items, make_scheme: MakeScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published implementation with --brecq."""

    def check(_name: str, unit: nn.Module, *rest: Any, **more: Any) -> UnitLosses:
        activations = [q for n, q in quantizers(unit) if not n.endswith("weight_quantizer")]
        assert {quantizer.mode for quantizer in activations} == {Mode.FLOAT}
        return reconstruct_unit(_name, unit, *rest, **more)

    monkeypatch.setattr(engine, "reconstruct_unit", check)
    for compat in ("published", "faithful"):
        model = quantize_sam(sam, items, quick(make_scheme, compat, weights_only=True))
        for _, unit in model_units(model):
            if compat == "published":
                assert defects(unit) == published(unit)
            else:
                assert {*defects(unit)} == {(0.0, "nearest")}


def test_layers_learned_one_by_one_are_all_hard(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    model = quantize_sam(sam, items, quick(make_scheme, granularity="layer"))
    assert {*defects(model)} == {(0.5, "hard")}


def test_no_unit_falls_back(
    sam: Sam,
    items: Items,
    make_scheme: MakeScheme,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The published implementation keeps what it learned, however bad."""

    def spoil(
        _name: str, _unit: nn.Module, rounding: list[Any], *_rest: object, **_more: object
    ) -> list[float]:
        for quantizer in rounding:
            quantizer.alpha.data.neg_()
        return []

    monkeypatch.setattr(reconstruction, "_optimize", spoil)
    model = quantize_sam(sam, items, quick(make_scheme))
    assert "became worse" not in caplog.text
    assert all(layer.weight_quantizer.has_learned for _, layer in quantized_layers(model))


def test_a_resumed_run_ends_alike(
    sam: Sam, items: Items, make_scheme: MakeScheme, tmp_path: Path
) -> None:
    scheme = quick(make_scheme)
    first = quantize_sam(sam, items, scheme, journal=Journal(tmp_path, {}, resume=False))
    index = tmp_path / "journal.json"
    content = json.loads(index.read_text())
    content["parts"] = dict(list(content["parts"].items())[:4])
    index.write_text(json.dumps(content))
    again = quantize_sam(sam, items, scheme, journal=Journal(tmp_path, {}, resume=True))
    ours, theirs = first.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = [arguments_of(m, model_units(m)[-1][1], items[:1]) for m in (first, again)]
    torch.testing.assert_close(*inputs, rtol=0, atol=0)
