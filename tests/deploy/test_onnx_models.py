from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ptq4sam.deploy.onnx import attention, sums
from ptq4sam.deploy.onnx.decoder import decoder_graph
from ptq4sam.deploy.onnx.encoder import encoder_graph
from ptq4sam.deploy.targets import onnxruntime, openvino
from ptq4sam.errors import DeployError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.sam.geometry import Geometry
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import ImageEmbedding, Predictor
from tests.deploy.runtime_graphs import (
    RUNTIMES,
    dialect,
    onnxruntime_operators,
    openvino_precisions,
    relative_error,
    run_graph,
)

pytestmark = pytest.mark.usefixtures("shared_sessions")

Quantize = Callable[..., QuantizedSam]
Format = dict[str, Any]


def formats(bits: int, symmetric: bool) -> dict[str, Format]:
    common = {"quantizer": "FixedFakeQuantize", "observer": "MinMaxObserver", "bit": bits}
    return {
        "a_qconfig": {**common, "symmetric": symmetric},
        "w_qconfig": {**common, "symmetric": symmetric, "ch_axis": 0},
    }


SCHEMES: dict[str, tuple[int, dict[str, Any]]] = {
    "W8A8 symmetric": (8, {**formats(8, True), "ptq4sam": {}}),
    "W8A8": (8, {**formats(8, False), "ptq4sam": {}}),
    "W6A6 PTQ4SAM": (6, {}),
    "W4A4 PTQ4SAM": (4, {}),
    "W4A4 hybrid": (4, {"slots": {"input@after-gelu": {"grid": "hybrid"}}}),
    "W4A4 grouped": (4, {"slots": {"input@after-gelu": {"grid": "grouped"}}}),
    "W4A4 LNQ": (4, {"slots": {"softmax": {"grid": "lnq"}}}),
}


def picture() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_float_model_is_itself(sam: Sam, runtime: str, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = sam.image_encoder(picture()).numpy()
    inputs = {"image": picture().numpy()}
    (found,) = run_graph(encoder_graph(sam, dialect(runtime)), runtime, tmp_path, inputs)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_encoder_is_that_of_the_simulation(
    scheme: str, runtime: str, quantize: Quantize, tmp_path: Path
) -> None:
    bits, content = SCHEMES[scheme]
    model = quantize(bits, **content)
    with torch.no_grad():
        expected = model.image_encoder(picture()).numpy()
    graph = encoder_graph(model, dialect(runtime))
    (found,) = run_graph(graph, runtime, tmp_path, {"image": picture().numpy()})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attention_in_pieces_is_attention(
    runtime: str, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(6)
    inputs = {"image": picture().numpy()}
    (whole,) = run_graph(encoder_graph(model, dialect(runtime)), runtime, tmp_path, inputs)
    cut = replace(dialect(runtime), whole_bytes=0, piece_bytes=2 * 8 * 64 * 4)
    pieces = encoder_graph(model, cut)
    (found,) = run_graph(pieces, runtime, tmp_path, inputs)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("scheme", ["W8A8 symmetric", "W8A8"])
def test_products_of_digits_are_products(
    scheme: str, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float32 needs them where the sums of an attention are too large for it."""
    bits, content = SCHEMES[scheme]
    model = quantize(bits, **content)
    with torch.no_grad():
        expected = model.image_encoder(picture()).numpy()
    whole = encoder_graph(model, openvino.DIALECT)
    monkeypatch.setattr(sums, "EXACT", 1.0)
    digits = encoder_graph(model, openvino.DIALECT)
    counts = []
    for graph in (whole, digits):
        (found,) = run_graph(graph, "openvino", tmp_path, {"image": picture().numpy()})
        np.testing.assert_array_equal(found, expected)
        nodes = onnx.load(tmp_path / "graph.onnx").graph.node
        counts.append(sum(node.op_type == "MatMul" for node in nodes))
    assert counts[1] - counts[0] == 2 * len(model.image_encoder.blocks)


def test_layers_and_products_run_on_integers(quantize: Quantize, tmp_path: Path) -> None:
    bits, content = SCHEMES["W8A8 symmetric"]
    model = quantize(bits, **content)
    attentions = len(model.image_encoder.blocks)
    # Without the two convolutions; query, key and value are products of their own.
    layers = len(quantized_layers(model.image_encoder)) - 2 + 2 * attentions
    encoder_graph(model, onnxruntime.DIALECT).write(tmp_path / "unsigned.onnx", {})
    operators = onnxruntime_operators(tmp_path / "unsigned.onnx", tmp_path)
    assert operators["MatMulIntegerToFloat"] == layers + 2 * attentions
    # It would quantize sums by one quotient of three scales: other codes in the middle of two.
    assert operators["QLinearMatMul"] == 0
    # What is left: relative positions on each axis, up to three digits of them.
    assert 2 * attentions <= operators["MatMul"] <= 6 * attentions
    assert operators["Gemm"] == 0

    # Positions are float in all, the product with the values is so under adaptive granularity.
    for scheme, more in (("W8A8 symmetric", 2), ("W6A6 PTQ4SAM", 1), ("W4A4 PTQ4SAM", 1)):
        bits, content = SCHEMES[scheme]
        quantized = quantize(bits, **content)
        encoder_graph(quantized, openvino.DIALECT).write(tmp_path / "signed.onnx", {})
        kinds = ("MatMul", "FullyConnected", "FullyConnectedQuantizedLegacy")
        found = openvino_precisions(tmp_path / "signed.onnx", kinds)
        # The neck's first convolution, of one place behind a transposition, is one of them.
        assert found["i8"] + found["u8"] == layers + 1 + more * attentions
        # And sums of points that float32 would round are those of pieces.
        assert (4 - more) * attentions <= found["f32"] <= (10 - more) * attentions


def test_too_many_places_for_exact_sums_are_an_error(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(6)
    monkeypatch.setattr(attention, "MOST_TERMS", 10)
    with pytest.raises(DeployError, match=r"blocks\.\d\.attn\.core attends to \d+ places"):
        encoder_graph(model, onnxruntime.DIALECT)
    encoder_graph(model, openvino.FAST)


def decoder_inputs(model: Sam, features: torch.Tensor, **given: Any) -> dict[str, Any]:
    height, width = model.mask_input_size
    count = len(next(iter(given.values())))
    inputs = {
        "embedding": features.numpy(),
        "points": np.zeros((count, 0, 2), np.float32),
        "labels": np.zeros((count, 0), np.int64),
        "boxes": np.zeros((count, 0, 4), np.float32),
        "mask": np.zeros((1, 1, height, width), np.float32),
        "has_mask": np.array([float("mask" in given)], np.float32),
        "multimask": np.array([0], np.int64),
        "original_size": np.array([64, 64], np.int64),
    }
    return inputs | given


BOXES = np.array([[4, 6, 30, 40], [10, 20, 60, 50], [0, 0, 64, 64]], np.float32)
POINTS = np.array([[[5, 6], [40, 30]], [[20, 20], [1, 60]], [[7, 9], [0, 0]]], np.float32)
LABELS = np.array([[1, 0], [1, 1], [1, -1]], np.int64)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompts", ["boxes", "points", "both", "mask", "box and mask"])
def test_prompts_of_all_kinds(
    prompts: str, multimask: bool, runtime: str, sam: Sam, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(1, 32, 8, 8, generator=generator)
    mask = torch.randn(3, 1, 32, 32, generator=generator)
    given: dict[str, Any] = {"multimask": np.array([int(multimask)])}
    arguments: dict[str, Any] = {"points": None, "boxes": None, "masks": None}
    if prompts in ("boxes", "both", "box and mask"):
        given["boxes"] = BOXES[:, None]
        arguments["boxes"] = torch.from_numpy(BOXES)
    if prompts in ("points", "both"):
        given |= {"points": POINTS, "labels": LABELS}
        arguments["points"] = torch.from_numpy(POINTS), torch.from_numpy(LABELS)
    if prompts == "points":
        given["points"] = np.pad(POINTS, ((0, 0), (0, 1), (0, 0)))
        given["labels"] = np.pad(LABELS, ((0, 0), (0, 1)), constant_values=-1)
    if "mask" in prompts:
        given["mask"], arguments["masks"] = mask.numpy(), mask
    if prompts == "mask":
        # Nothing else says how many prompts there are.
        given |= {"points": np.zeros((3, 0, 2), np.float32), "labels": np.zeros((3, 0), np.int64)}
        given["boxes"] = np.zeros((3, 0, 4), np.float32)
    with torch.no_grad():
        expected = sam.decode((features,), **arguments, multimask=multimask)
    inputs = decoder_inputs(sam, features, **(given | {"multimask": given["multimask"]}))
    found = run_graph(
        decoder_graph(sam, dialect(runtime)), runtime, tmp_path, with_count(inputs, 3)
    )
    for ours, theirs in zip(found, expected, strict=False):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs.numpy()) < 1e-4


def with_count(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Empty prompts for so many rows."""
    shapes = {"points": (count, 0, 2), "labels": (count, 0), "boxes": (count, 0, 4)}
    return {
        name: value.reshape(shapes[name]) if name in shapes and value.size == 0 else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", ["float", "W8A8", "W4A4 PTQ4SAM"])
def test_without_prompts_there_are_no_masks(
    scheme: str, runtime: str, sam: Sam, quantize: Quantize, tmp_path: Path
) -> None:
    """Where a detector finds nothing."""
    if scheme != "float":
        bits, content = SCHEMES[scheme]
        sam = quantize(bits, **content)
    features = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(6))
    boxes = np.zeros((0, 1, 4), np.float32)
    more = {"multimask": np.array([1]), "original_size": np.array([48, 64])}
    inputs = decoder_inputs(sam, features, boxes=boxes) | more
    graph = decoder_graph(sam, dialect(runtime))
    found = run_graph(graph, runtime, tmp_path, inputs)
    assert [x.shape for x in found] == [(0, 3, 32, 32), (0, 3), (0, 3, 48, 64)]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("size", [(48, 64), (300, 200), (31, 57), (64, 3)])
def test_masks_at_the_size_of_the_picture(
    size: tuple[int, int], runtime: str, sam: Sam, tmp_path: Path
) -> None:
    features = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(7))
    inputs = decoder_inputs(
        sam, features, boxes=BOXES[:, None], original_size=np.array(size, np.int64)
    )
    low_res, _, masks = run_graph(
        decoder_graph(sam, dialect(runtime)), runtime, tmp_path, with_count(inputs, 3)
    )
    embedding = ImageEmbedding.of((features,), size, sam.geometry)
    expected = Predictor(sam).full_resolution(torch.from_numpy(low_res), embedding)
    assert masks.shape == expected.shape
    assert relative_error(masks, expected.numpy()) < 1e-5


def test_sizes_of_resized_pictures_are_those_of_the_predictor() -> None:
    sides = range(1, 700, 3)
    for side in (256, 1024):
        geometry = Geometry(side, side, ())
        for longest in sides:
            for other in range(1, longest + 1, 7):
                quotient = (2 * other * side + longest) // (2 * longest)
                assert (max(1, quotient), side) == geometry.placed((other, longest))
