from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import ptq4sam
from ptq4sam.errors import ConfigError, DataError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.prompts import GroundTruth
from ptq4sam.runs.calibration import calibration_pictures
from ptq4sam.sam.predictor import Predictor
from tests.tiny_runs import QUICK, SCHEMES, SMALL, Tiny

pytest_plugins = ("tests.tiny_fixtures",)


def test_everything_that_is_listed_is_there() -> None:
    for name in ptq4sam.__all__:
        assert getattr(ptq4sam, name) is not None
    with pytest.raises(AttributeError, match="prune"):
        ptq4sam.prune  # noqa: B018


def test_quantize_evaluate_save_and_load(tiny: Tiny, tmp_path: Path) -> None:
    sam = ptq4sam.load_sam(SMALL, tiny.checkpoint)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    train = ptq4sam.CocoDataset(tiny.images("train"), tiny.annotations("train"))
    val = ptq4sam.CocoDataset(tiny.images(), tiny.annotations(), limit=1)
    scheme = ptq4sam.Scheme.from_yaml(SCHEMES / "minmax66.yaml").with_overrides(*QUICK)
    qsam = ptq4sam.quantize(sam, train, dataclasses.replace(scheme, calibrate=1))
    assert all(torch.equal(before[name], tensor) for name, tensor in sam.state_dict().items())

    scores = ptq4sam.evaluate(qsam, val, reference=sam)
    assert {"AP", "AR", "mean_iou", "agreement"} <= scores.keys()
    assert 0 < scores["agreement"] <= 1
    assert ptq4sam.evaluate(sam, val, reference=sam)["agreement"] == 1

    ptq4sam.save(qsam, tmp_path / "q.safetensors")
    again = ptq4sam.load(tmp_path / "q.safetensors")
    image = val.load(val.images[0])
    box = np.array([[20.0, 30.0, 200.0, 180.0]])
    predictions = []
    for model in (qsam, again):
        predictor = Predictor(model)
        predictions.append(predictor.predict(boxes=box, embedding=predictor.embed(image)))
    assert torch.equal(predictions[0].low_res, predictions[1].low_res)
    assert torch.equal(predictions[0].iou_predictions, predictions[1].iou_predictions)


def test_calibration_items_give_the_model_that_their_data_set_gives(tiny: Tiny) -> None:
    sam = ptq4sam.load_sam(SMALL, tiny.checkpoint)
    train = ptq4sam.CocoDataset(tiny.images("train"), tiny.annotations("train"))
    scheme = ptq4sam.Scheme.from_yaml(SCHEMES / "minmax66.yaml").with_overrides(
        "calibrate=1", *QUICK
    )
    items = calibration_pictures(sam, train, GroundTruth(train), 1, Prompting())
    states = [
        ptq4sam.quantize(sam, calibration, scheme, quantize_encoder=False).state_dict()
        for calibration in (train, list(items))
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bad_input_is_a_named_error(tiny: Tiny) -> None:
    sam = ptq4sam.load_sam(SMALL, tiny.checkpoint)
    folder = ptq4sam.ImageFolder(tiny.images())
    with pytest.raises(ConfigError, match="no such scheme file"):
        ptq4sam.quantize(sam, folder, "nowhere.yaml")
    with pytest.raises(DataError, match="annotations"):
        ptq4sam.quantize(sam, folder, SCHEMES / "minmax66.yaml")
    with pytest.raises(DataError, match="annotations"):
        ptq4sam.evaluate(sam, folder)
    with pytest.raises(ConfigError, match="scene-detector"):
        ptq4sam.evaluate(sam, folder, "scene-detectors")
