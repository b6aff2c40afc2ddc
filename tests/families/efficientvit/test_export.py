"""EfficientViT's encoder and both squares go to runtimes with the simulation's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq4sam.deploy.export import export
from ptq4sam.deploy.exported import open_exported
from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor
from tests.deploy.runtime_graphs import RUNTIMES, dialect, relative_error, run_graph
from tests.tiny_runs import SCHEMES

_OWN = "{granularity: per head, observer: MinMaxObserver}"
HEADS = f"slots={{query: {_OWN}, key: {_OWN}, value: {_OWN}}}"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_float_encoder_is_itself(
    tiny: Sam, items: list[CalibrationItem], runtime: str, tmp_path: Path
) -> None:
    pixels = items[0].pixels
    graph = encoder_graph(tiny, dialect(runtime))
    (found,) = run_graph(graph, runtime, tmp_path, {"image": pixels.numpy()})
    assert relative_error(found, tiny.image_encoder(pixels).numpy()) < 1e-5


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("w8a8", []),
        ("ptq4sam-l44", []),
        ("w8a8", ["a_qconfig.symmetric=True", HEADS]),
        ("w8a8", [HEADS]),
    ],
)
def test_a_quantized_encoder_is_that_of_the_simulation(
    tiny: Sam,
    items: list[CalibrationItem],
    name: str,
    overrides: list[str],
    runtime: str,
    tmp_path: Path,
) -> None:
    scheme = Scheme.from_yaml(SCHEMES / f"{name}.yaml").with_overrides(
        "w_qconfig.observer=MinMaxObserver", *overrides
    )
    if scheme.recon is not None:
        scheme = scheme.with_overrides("recon.iters=2")
    with torch.enable_grad():
        model = quantize_sam(tiny, items, scheme)
    pixels = items[1].pixels
    graph = encoder_graph(model, dialect(runtime))
    assert graph.exact
    (found,) = run_graph(graph, runtime, tmp_path, {"image": pixels.numpy()})
    np.testing.assert_array_equal(found, model.image_encoder(pixels).numpy())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_export_places_prompts_in_their_own_square(
    tiny: Sam, items: list[CalibrationItem], runtime: str, tmp_path: Path
) -> None:
    scheme = Scheme.from_yaml(SCHEMES / "w8a8.yaml")
    with torch.enable_grad():
        model = quantize_sam(tiny, items, scheme)
    manifest = export(model, tmp_path, TARGETS[runtime].form)
    assert manifest.exact
    exported = open_exported(tmp_path, runtime)
    assert exported.geometry == model.geometry
    assert exported.geometry.prompt_side == 2 * exported.geometry.encoder_side
    image = np.random.RandomState(0).randint(0, 256, (30, 50, 3)).astype(np.uint8)
    found, expected = Predictor(exported), Predictor(model)
    for predictor in (found, expected):
        predictor.set_image(image)
    boxes = [[3, 4, 30, 25], [10, 0, 49, 29]]
    ours, theirs = (p.predict(boxes=boxes, multimask=True) for p in (found, expected))
    masks, simulated = (p.binary_masks(x.low_res) for p, x in ((found, ours), (expected, theirs)))
    assert simulated.float().mean() > 0.01
    assert masks.equal(simulated)
