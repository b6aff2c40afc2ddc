"""Units learn the same by recorded steps; here with recordings that do what CUDA graphs do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptq4sam.methods import graphs, reconstruction
from ptq4sam.methods.reconstruction import UnitData, UnitLosses, reconstruct_unit
from ptq4sam.model.calibration import CalibrationItem, calibrate, run_item
from ptq4sam.model.capture import capture_call
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.recon import Reconstruction
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.fake_graphs import FakeGraphs
from tests.model.conftest import scheme_of, tiny_items, tiny_sam

UNITS = (
    "image_encoder.blocks.0.attn",
    "image_encoder.blocks.1.mlp",
    "mask_decoder.transformer.layers.0.cross_attn_token_to_image",
)

Fakes = list[FakeGraphs]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """The recorders in use, of a CPU too."""
    made: Fakes = []

    def fake(generator: torch.Generator) -> FakeGraphs:
        made.append(FakeGraphs(generator))
        return made[-1]

    monkeypatch.setattr(graphs, "recorder", fake)
    return made


METHODS = {"BIG": True, "AGQ": True, "exact": False, "taus": [2]}


@pytest.fixture(scope="module")
def calibrated() -> QuantizedSam:
    quantized = insert_quantizers(tiny_sam(), scheme_of(4, 1, ptq4sam=METHODS))
    calibrate(quantized, tiny_items()[:2])
    return quantized


@pytest.fixture
def model(calibrated: QuantizedSam) -> QuantizedSam:
    return copy.deepcopy(calibrated)


@torch.no_grad()
def seen(model: QuantizedSam, name: str, items: list[CalibrationItem]) -> UnitData:
    """What a unit sees of some pictures, and should give."""
    found = []
    for item in items[:2]:
        inputs, target = capture_call(model.get_submodule(name), lambda i=item: run_item(model, i))
        found.append((inputs, (target,)))
    noise = torch.Generator().manual_seed(2)
    exact = [
        tuple(x + 0.1 * torch.randn(x.shape, generator=noise).to(x) for x in inputs)
        for inputs, _ in found
    ]
    return UnitData([inputs for inputs, _ in found], exact, [target for _, target in found])


def learned(
    model: QuantizedSam, name: str, data: UnitData, **settings: object
) -> tuple[dict[str, Tensor], UnitLosses]:
    unit = copy.deepcopy(model).get_submodule(name)
    layers = [(layer.weight, layer.weight_quantizer) for _, layer in quantized_layers(unit)]
    recon = Reconstruction(iters=24, scale_lr=1e-3, **settings)  # type: ignore[arg-type]
    generator = torch.Generator(model.device).manual_seed(5)
    losses = reconstruct_unit(name, unit, layers, data, recon, generator, fall_back=False)
    return unit.state_dict(), losses


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (UNITS[0], {}),
        (UNITS[1], {"batch_size": 2}),
        (UNITS[1], {"precision": "bfloat16"}),
        (UNITS[1], {"learn_scale": False, "drop_prob": 0.25}),
        (UNITS[1], {"learn_rounding": False, "patience": 8}),
        (UNITS[2], {"drop_prob": 0.0}),
    ],
    ids=["attention", "two-pictures", "bfloat16", "rounding", "scales", "cross-attention"],
)
def test_a_unit_is_learned_the_same_by_replayed_steps(
    model: QuantizedSam,
    items: list[CalibrationItem],
    fakes: Fakes,
    name: str,
    settings: dict[str, object],
) -> None:
    data = seen(model, name, items)
    expected = learned(model, name, data, cuda_graphs=False, **settings)
    assert fakes == []
    state, losses = learned(model, name, data, **settings)
    assert fakes[0].replayed > 12
    assert losses == expected[1]
    assert all(torch.equal(value, expected[0][key]) for key, value in state.items())
    # What was learned is not what was there before.
    before = model.get_submodule(name).state_dict()
    assert any(before[key].shape != x.shape or (before[key] != x).any() for key, x in state.items())


def test_a_step_that_reads_a_number_is_not_recorded(
    model: QuantizedSam,
    items: list[CalibrationItem],
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_error = reconstruction._step_error

    def reading(*arguments: object) -> Tensor:
        error: Tensor = step_error(*arguments)  # type: ignore[arg-type]
        assert error.detach() >= 0
        return error

    data = seen(model, UNITS[1], items)
    expected = learned(model, UNITS[1], data, cuda_graphs=False)
    monkeypatch.setattr(reconstruction, "_step_error", reading)
    state, losses = learned(model, UNITS[1], data)
    assert (fakes[0].recorded, losses) == (0, expected[1])
    assert all(torch.equal(value, expected[0][key]) for key, value in state.items())


@pytest.mark.gpu
def test_a_unit_is_learned_the_same_by_cuda_graphs(
    model: QuantizedSam, items: list[CalibrationItem]
) -> None:
    model = model.to("cuda")
    moved = [CalibrationItem(item.pixels.to("cuda"), item.boxes.to("cuda")) for item in items]
    for name in UNITS:
        data = seen(model, name, moved)
        first, again = (learned(model, name, data, cuda_graphs=on) for on in (True, False))
        assert first[1] == again[1]
        assert all(torch.equal(value, again[0][key]) for key, value in first[0].items())


LSQ_PLUS = {"quantizer": "LSQPlusFakeQuantize", "observer": "AvgMinMaxObserver", "bit": 4}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"a_qconfig": LSQ_PLUS},
        {"slots": {"input@after-gelu": {"grid": "hybrid"}, "softmax": {"grid": "hybrid"}}},
        {"recon": {"granularity": "layer", "batch_size": 2}},
    ],
    ids=["lsq", "lsq-plus", "hybrid", "layers"],
)
def test_steps_of_every_unit_can_be_recorded(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    fakes: Fakes,
    caplog: pytest.LogCaptureFixture,
    more: dict[str, object],
) -> None:
    given = {"ptq4sam": {} if "slots" in more else METHODS, **more}
    quantized = quantize_sam(sam, items[:1], make_scheme(4, 8, **given))
    assert len(fakes) >= len(model_units(quantized))
    assert {fake.recorded for fake in fakes} == {1}
    assert "could not be recorded" not in caplog.text
