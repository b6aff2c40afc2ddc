from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ptq4sam.deploy.codes import UniformGrid, layer_codes, uniform_grid
from ptq4sam.errors import CalibrationError, DeployError
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.quantizers import LSQPlusQuantizer
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Quantize = Callable[..., QuantizedSam]

FORMATS = {
    "a scale a channel": {"ch_axis": 0},
    "one scale": {"ch_axis": -1},
    "signed": {"ch_axis": 0, "symmetric": True},
}


@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS.keys())
def test_codes_and_scales_give_the_weight_bit_for_bit(
    quantize: Quantize, changes: dict[str, object]
) -> None:
    weights = {"quantizer": "FixedFakeQuantize", "observer": "MinMaxObserver", "bit": 3, **changes}
    for _, layer in quantized_layers(quantize(3, w_qconfig=weights)):
        codes = layer_codes(layer)
        assert torch.equal(codes.weight(), layer.weight)
        assert codes.codes.dtype == codes.zero_point.dtype == torch.int32
        assert codes.codes.min() >= codes.grid.qmin
        assert codes.codes.max() <= codes.grid.qmax


def test_a_weight_off_its_grid_is_named(quantize: Quantize) -> None:
    model = quantize()
    layer = model.image_encoder.neck[0]
    layer.weight[0, 0] += 1e-3
    with pytest.raises(DeployError, match=r"neck\.0.weight_quantizer is not on its grid"):
        layer_codes(layer)  # type: ignore[arg-type]


def test_activations_have_the_grid_that_they_are_quantized_on(quantize: Quantize) -> None:
    attention = quantize().image_encoder.blocks[0].attn
    found = uniform_grid(attention.core.query_quantizer)
    assert isinstance(found, UniformGrid)
    x = torch.linspace(-3, 3, 1000)
    scale = torch.tensor(found.scale)
    codes = (torch.round(x / scale) + found.zero_point).clamp(found.grid.qmin, found.grid.qmax)
    assert torch.equal(attention.core.query_quantizer(x), (codes - found.zero_point) * scale)

    with pytest.raises(DeployError, match="has no evenly spaced grid with one scale"):
        uniform_grid(attention.core.softmax_quantizer)


def test_a_learned_zero_point_is_given_as_the_code_it_is_used_as(quantize: Quantize) -> None:
    formats = {"quantizer": "LSQPlusFakeQuantize", "observer": "AvgMinMaxObserver", "bit": 4}
    quantizer = quantize(a_qconfig=formats).image_encoder.neck[2].input_quantizer
    assert isinstance(quantizer, LSQPlusQuantizer)
    quantizer.zero_point.fill_(6.7)
    quantizer.scale.neg_()
    found = uniform_grid(quantizer)
    assert found.zero_point == 7
    assert found.scale > 0


def test_without_calibration_there_are_no_codes(
    sam: Sam, make_scheme: Callable[..., Scheme]
) -> None:
    model = insert_quantizers(sam, make_scheme())
    with pytest.raises(CalibrationError, match="calibrate the model first"):
        layer_codes(model.image_encoder.neck[0])  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="calibrate the model first"):
        uniform_grid(model.image_encoder.blocks[0].attn.core.query_quantizer)
