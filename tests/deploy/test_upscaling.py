"""The decoder's upscaling, quantized where a scheme asks: calibrated, audited, saved, exported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from ptq4sam.deploy.cost import count
from ptq4sam.deploy.onnx.decoder import decoder_graph
from ptq4sam.deploy.onnx.graph import Dimension
from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import ConfigError
from ptq4sam.model.audit import audit
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.operators.base import quantized_operators
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.deploy.runtime_graphs import RUNTIMES, dialect, run_graph
from tests.deploy.test_onnx_models import BOXES, SCHEMES, decoder_inputs, with_count

Quantize = Callable[..., QuantizedSam]
Forward = Callable[[Sam], tuple[Tensor, ...]]
LAYERS = ["mask_decoder.output_upscaling.0", "mask_decoder.output_upscaling.3"]


def with_upscaling(quantize: Quantize, scheme: str = "W8A8") -> QuantizedSam:
    bits, content = SCHEMES[scheme]
    return quantize(bits, **content, upscaling="quantized")


def upscaling(sam: Sam) -> list[str]:
    return [name for name, _ in quantized_operators(sam) if "upscaling" in name]


def test_it_stays_float_unless_a_scheme_asks(quantize: Quantize) -> None:
    assert upscaling(quantize(8, **SCHEMES["W8A8"][1])) == []
    assert upscaling(with_upscaling(quantize)) == LAYERS


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4 hybrid"])
def test_it_is_audited_saved_and_summed_in_integers(
    scheme: str, quantize: Quantize, forward: Forward, tmp_path: Path
) -> None:
    model = with_upscaling(quantize, scheme)
    report = audit(model, lambda: forward(model))
    assert report.passed, "\n".join(report.lines())
    expected = forward(model)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert upscaling(loaded) == LAYERS
    for same in (loaded, integer_model(model)):
        for found, wanted in zip(forward(same), expected, strict=True):
            assert torch.equal(found, wanted)


def test_an_upscaling_that_was_put_back_is_found(quantize: Quantize, forward: Forward) -> None:
    model, sam = with_upscaling(quantize), quantize(8, **SCHEMES["W8A8"][1])
    model.mask_decoder.output_upscaling[0] = sam.mask_decoder.output_upscaling[0]
    report = audit(model, lambda: forward(model))
    assert any(finding.where == LAYERS[0] for finding in report.findings)


def test_more_bits_are_nearer(quantize: Quantize, forward: Forward) -> None:
    """With the same transformer, masks differ by the bits of the upscaling alone."""

    def masks(**more: object) -> Tensor:
        return forward(quantize(8, **SCHEMES["W8A8"][1], **more))[1]

    def at(bits: int) -> Tensor:
        slots = {f"{slot}@convolution@decoder": {"bit": bits} for slot in ("weight", "input")}
        return masks(upscaling="quantized", slots=slots)

    exact = masks()
    errors = [float((at(bits) - exact).norm()) for bits in (3, 5, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", ["W8A8 symmetric", "W8A8", "W4A4 PTQ4SAM"])
def test_an_exported_decoder_has_the_codes_of_the_simulation(
    scheme: str, runtime: str, quantize: Quantize, tmp_path: Path
) -> None:
    model = with_upscaling(quantize, scheme)
    features = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(6))
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name in LAYERS:

            def keep(_module: object, _x: object, output: Tensor, name: str = name) -> None:
                seen[name] = output

            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        low_res, iou = model.decode((features,), None, torch.from_numpy(BOXES), None, False)
    graph = decoder_graph(model, dialect(runtime))
    inputs = with_count(decoder_inputs(model, features, boxes=BOXES[:, None]), 3)
    # What the layers give, for which all their codes have to be the same.
    for name in LAYERS:
        graph.output(
            f"of.{name}",
            squares(graph, name),
            np.float32,
            [Dimension("prompts"), *seen[name].shape[1:]],
        )
    found = run_graph(graph, runtime, tmp_path, inputs)
    for name, output in zip(LAYERS, found[3:], strict=True):
        np.testing.assert_array_equal(output, seen[name].numpy())
    np.testing.assert_allclose(found[0], low_res.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], iou.numpy(), rtol=1e-4, atol=1e-4)


def squares(graph: Any, name: str) -> str:
    nodes: list[onnx.NodeProto] = graph._nodes
    return next(n.output[0] for n in nodes if n.op_type == "DepthToSpace" and name in n.name)


def test_its_cost_is_that_of_its_bits(make_scheme: Callable[..., Scheme]) -> None:
    scheme = make_scheme(8, **SCHEMES["W8A8"][1])
    float_upscaling, quantized = (
        count("tiny", each).total for each in (scheme, scheme.with_overrides("upscaling=quantized"))
    )
    # Two transposed convolutions on 8 x 8 and 16 x 16 cells of 32 and 8 channels; 4 places each.
    macs = 4 * (8 * 8 * 32 * 8 + 16 * 16 * 8 * 4)
    assert float_upscaling.macs == quantized.macs
    assert float_upscaling.bit_operations - quantized.bit_operations == macs * (32**2 - 8**2)


def test_it_is_not_reconstructed(make_scheme: Callable[..., Scheme]) -> None:
    with pytest.raises(ConfigError, match="units end at the decoder's transformer") as caught:
        make_scheme(4, 10, upscaling="quantized")
    assert "\n" not in str(caught.value)


def test_slots_are_named_by_the_kind_of_their_operator(
    sam: Sam, make_scheme: Callable[..., Scheme]
) -> None:
    slots = {
        "input@linear": {"bit": 5},
        "weight@convolution": {"bit": 7},
        "key@attention": {"bit": 3},
    }
    scheme = make_scheme(4, **SCHEMES["W8A8"][1] | {"slots": slots, "upscaling": "quantized"})
    found: dict[str, set[int]] = {}
    for _, operator in quantized_operators(insert_quantizers(sam, scheme)):
        for slot, quantizer in operator.slots().items():
            found.setdefault(f"{slot} of {operator.kind}", set()).add(quantizer.grid.bits)
    assert found["input of linear"] == {5}
    assert found["weight of convolution"] == {7}
    assert found["key of attention"] == {3}
    assert found["weight of linear"] == found["input of convolution"] == {8}
