"""TinyViT's encoder goes to runtimes with the simulation's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.families import build_sam
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from tests.deploy.runtime_graphs import RUNTIMES, dialect, relative_error, run_graph
from tests.tiny_runs import SCHEMES

SIDE = 64


def picture() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_float_encoder_is_itself(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam("tiny_vit_nano", SIDE)
    expected = sam.image_encoder(picture()).numpy()
    graph = encoder_graph(sam, dialect(runtime))
    (found,) = run_graph(graph, runtime, tmp_path, {"image": picture().numpy()})
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["w8a8", "ptq4sam-s44", "ptq4sam-l44", "tinysam/w8a8"])
def test_a_quantized_encoder_is_that_of_the_simulation(
    name: str, runtime: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    scheme = Scheme.from_yaml(SCHEMES / f"{name}.yaml").with_overrides(
        "w_qconfig.observer=MinMaxObserver"
    )
    if scheme.recon is not None:
        scheme = scheme.with_overrides("recon.iters=2")
    if "range-search" in scheme.method_settings:
        scheme = scheme.with_overrides("methods.range-search={steps: 3, rounds: 1, pictures: 1}")
    items = [CalibrationItem(picture(), torch.tensor([[4.0, 4, 40, 40]]))]
    model = quantize_sam(build_sam("tiny_vit_nano", SIDE), items, scheme)
    expected = model.image_encoder(picture()).numpy()
    graph = encoder_graph(model, dialect(runtime))
    (found,) = run_graph(graph, runtime, tmp_path, {"image": picture().numpy()})
    np.testing.assert_array_equal(found, expected)
