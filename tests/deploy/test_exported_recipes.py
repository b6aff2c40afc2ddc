"""Our recipes on the runtimes: the codes of the simulation, and nothing left float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq4sam.deploy import open_exported
from ptq4sam.deploy.export import export
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

BOXES = [[5.0, 6, 40, 50], [20, 10, 60, 30], [1, 1, 70, 44]]
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}


def recipe(name: str, sam: Sam, items: list[CalibrationItem]) -> QuantizedSam:
    # The search for the best grid of a weight takes seconds and is tested elsewhere.
    scheme = Scheme.from_yaml(name).with_overrides("w_qconfig.observer=MinMaxObserver")
    return quantize_sam(sam, items[:2], scheme.with_steps(3))


@pytest.mark.parametrize(
    ("name", "runtimes"), [("sam4-s", tuple(TARGETS)), ("sam4-l", ("onnxruntime",))]
)
def test_a_recipe_has_the_codes_of_the_simulation(
    name: str, runtimes: tuple[str, ...], sam: Sam, items: list[CalibrationItem], tmp_path: Path
) -> None:
    model = recipe(name, sam, items)
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    simulated = Predictor(model)
    expected = simulated.embed(picture)
    theirs = simulated.predict(boxes=BOXES, embedding=expected)
    masks = simulated.binary_masks(theirs.low_res, expected)
    assert masks.any()
    for runtime in runtimes:
        manifest = export(model, tmp_path / runtime, FORMATS[runtime])
        assert manifest.exact
        deployed = Predictor(open_exported(tmp_path / runtime, runtime))
        assert torch.equal(deployed.embed(picture).features, expected.features)
        ours = deployed.predict(boxes=BOXES, embedding=expected)
        assert torch.equal(deployed.binary_masks(ours.low_res, expected), masks)
        torch.testing.assert_close(ours.low_res, theirs.low_res, rtol=1e-4, atol=1e-4)
