"""A student with quantizers learns, and ends as an ordinary quantized model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ptq4sam
from ptq4sam.deploy import open_exported
from ptq4sam.deploy.export import export
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.distillation.quantized import (
    begin_quantized,
    finish_quantized,
    learn_scales,
    require_tunable,
)
from ptq4sam.distillation.settings import Terms
from ptq4sam.distillation.trainer import Trainer
from ptq4sam.distillation.views import Batch
from ptq4sam.errors import ConfigError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.quantizers import FixedQuantizer, LSQQuantizer
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.auditing import audit_model
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor
from tests.distillation.conftest import SETTINGS, tiny_teacher
from tests.model.conftest import scheme_of, tiny_items

LAYER = "image_encoder.blocks.0.attn.proj"
SMOOTH = Terms(mask=0, focal=0, dice=0, iou=0)


def begun(scheme: Scheme) -> tuple[Sam, QuantizedSam]:
    teacher = tiny_teacher()
    return teacher, begin_quantized(teacher, scheme, tiny_items())


def trainer_of(teacher: Sam, student: QuantizedSam, terms: Terms = SMOOTH) -> Trainer:
    settings = SETTINGS.with_overrides("phases.0.rate=0.001", "phases.0.warm_up=0", "decay=0.5")
    settings = settings.with_overrides(*(f"phases.0.terms.{k}={v}" for k, v in _said(terms)))
    frozen = student.description.origin
    return Trainer(student, teacher, settings.phases[0], settings, frozen=frozen)


def _said(terms: Terms) -> list[tuple[str, object]]:
    return list(terms.to_dict().items())


def test_weights_and_scales_learn_and_come_nearer(batch: Batch) -> None:
    teacher, student = begun(scheme_of(4))
    learn_scales(student)
    trainer = trainer_of(teacher, student)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    losses = [trainer.train_step(batch)["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    after = student.state_dict()
    for name in ("weight", "weight_quantizer.scale", "input_quantizer.scale", "bias"):
        assert not torch.equal(after[f"{LAYER}.{name}"], before[f"{LAYER}.{name}"]), name
    for name in student.description.origin:
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("steps", [0, 2])
def test_the_result_is_an_ordinary_quantized_model(
    batch: Batch, steps: int, tmp_path: Path
) -> None:
    scheme = scheme_of(4, steps=steps)
    teacher, student = begun(scheme)
    replaced = learn_scales(student)
    kinds = {type(layer.weight_quantizer) for _, layer in quantized_layers(student)}
    assert kinds == {LSQQuantizer}
    trainer = trainer_of(teacher, student, Terms())
    trainer.train_step(batch)
    student.load_state_dict(trainer.average)
    learned = student.get_submodule(LAYER).weight_quantizer.scale.detach().clone()
    finish_quantized(student, replaced)
    assert student.scheme == scheme
    kinds = {type(layer.weight_quantizer) for _, layer in quantized_layers(student)}
    assert kinds == {AdaRoundQuantizer}
    assert student.get_submodule(LAYER).weight_quantizer.name == f"{LAYER}.weight_quantizer"
    torch.testing.assert_close(student.get_submodule(LAYER).weight_quantizer.scale, learned)
    report = audit_model(student)
    assert report.passed, report.findings
    assert not any(parameter.requires_grad for parameter in student.parameters())
    path = tmp_path / "tuned.safetensors"
    ptq4sam.save(student, path)
    again = ptq4sam.load(path)
    pixels = tiny_items()[0].pixels
    with torch.no_grad():
        assert torch.equal(again.embed(pixels)[0], student.embed(pixels)[0])


def test_fixed_scales_of_activations_learn_too() -> None:
    fixed = scheme_of(4).with_overrides("a_qconfig.quantizer=FixedFakeQuantize")
    _, student = begun(fixed)
    replaced = learn_scales(student)
    learner = student.get_submodule(LAYER).input_quantizer
    assert isinstance(learner, LSQQuantizer)
    with torch.no_grad():
        learner.scale.mul_(1.5)
    learned = learner.scale.detach().clone()
    finish_quantized(student, replaced)
    restored = student.get_submodule(LAYER).input_quantizer
    assert type(restored) is FixedQuantizer
    assert torch.equal(restored.scale, learned)
    assert audit_model(student).passed


def test_a_scheme_that_corrects_what_is_frozen_is_refused() -> None:
    with pytest.raises(ConfigError, match="qwt-v2, which corrects a model that learns no more"):
        require_tunable(scheme_of(4, methods=["qwt-v2"]))
    with pytest.raises(ConfigError, match="compat: published"):
        require_tunable(scheme_of(4, compat="published"))


def test_its_exports_have_the_bits_of_the_simulation(batch: Batch, tmp_path: Path) -> None:
    teacher, student = begun(scheme_of(4))
    replaced = learn_scales(student)
    trainer = trainer_of(teacher, student, Terms())
    trainer.train_step(batch)
    before = student.get_submodule(LAYER).input_quantizer.scale.detach().clone()
    trainer.train_step(batch)
    finish_quantized(student, replaced)
    # What is exported was learned.
    assert not torch.equal(student.get_submodule(LAYER).input_quantizer.scale, before)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    simulated = Predictor(student)
    embedding = simulated.embed(image)
    boxes = [[5.0, 6, 40, 50], [20, 10, 60, 30]]
    expected = simulated.predict(boxes=boxes, embedding=embedding)
    export(student, tmp_path, "onnx")
    export(student, tmp_path, "openvino")
    for runtime in TARGETS:
        deployed = Predictor(open_exported(tmp_path, runtime))
        assert torch.equal(deployed.embed(image).features, embedding.features), runtime
        # Float layers behind the decoder's codes differ in their last bits.
        found = deployed.predict(boxes=boxes, embedding=embedding)
        torch.testing.assert_close(found.low_res, expected.low_res, rtol=1e-4, atol=1e-4)
