"""A model without values: whatever is made on its way must be where the model is.

On the meta device, and there alone, a tensor elsewhere shows on any machine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ptq4sam.deploy.cost import storage
from ptq4sam.deploy.operations import operations
from ptq4sam.families import build_sam
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.plan import make_plan
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

MakeScheme = Callable[..., Scheme]
META = torch.device("meta")


def elsewhere(model: nn.Module) -> list[str]:
    """Parameters and buffers that are not on the meta device."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device != META]


@pytest.fixture
def meta_sam(sam: Sam) -> Sam:
    return sam.to(META)


@pytest.mark.parametrize("float_weights", ["float16", "float32"])
@pytest.mark.parametrize("quantizer", ["LSQFakeQuantize", "LSQPlusFakeQuantize"])
def test_quantizers_are_inserted_where_the_model_is(
    meta_sam: Sam, make_scheme: MakeScheme, float_weights: str, quantizer: str
) -> None:
    observed = {"observer": "AvgMSEObserver", "bit": 4, "quantizer": quantizer}
    scheme = make_scheme(float_weights=float_weights, a_qconfig=observed)
    quantized = insert_quantizers(meta_sam, scheme)
    assert len(list(quantizers(quantized))) > 100
    assert elsewhere(quantized) == []
    assert quantized.device == META


def test_plan_operations_and_size_leave_all_where_it_is(
    meta_sam: Sam, make_scheme: MakeScheme, items: list[CalibrationItem]
) -> None:
    scheme = make_scheme(steps=10)
    plan = make_plan(meta_sam, items, scheme, quantize_encoder=True, budget=0)
    quantized = insert_quantizers(meta_sam, scheme)
    assert [unit.name for unit in plan.units] == [name for name, _ in model_units(quantized)]
    assert all(unit.cached_bytes > 0 for unit in plan.units)
    counted = operations(quantized, boxes=3)
    assert {(4, 4)} < {operation.bits for operation in counted}
    assert sum(size for _, _, size in storage(quantized, half=True)) > 0
    assert elsewhere(quantized) == elsewhere(meta_sam) == []


def test_the_walk_finds_what_is_elsewhere() -> None:
    with META:
        model = build_sam("tiny")
    assert elsewhere(model) == []
    model.register_buffer("forgotten", torch.ones(1))
    assert isinstance(model, Sam)
    assert not isinstance(model, QuantizedSam)
    assert elsewhere(model) == ["forgotten"]
