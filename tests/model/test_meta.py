"""A model without values: whatever is made on its way must be where the model is.

On the meta device, and there alone, a tensor elsewhere shows on any machine.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptq4sam.deploy.cost import storage
from ptq4sam.deploy.operations import operations
from ptq4sam.families import build_sam
from ptq4sam.methods.reconstruction import output_error
from ptq4sam.model.calibration import CalibrationItem, calibrate, run_item
from ptq4sam.model.capture import capture_call
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.model.plan import make_plan
from ptq4sam.operators.arithmetic import learning
from ptq4sam.operators.base import quantized_layers
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


class FromHost(TorchDispatchMode):
    """Counts copies from the host to the meta device, for each of which a GPU's host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(not x.is_meta and x.dim() > 0 for x in given) and any(x.is_meta for x in made):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("hybrid", [False, True], ids=["even", "hybrid"])
def test_a_step_copies_nothing_from_the_host(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: MakeScheme,
    hybrid: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # torch knows no autocast for the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _kind: False)
    slots = {"input@after-gelu": {"grid": "hybrid"}, "softmax": {"grid": "hybrid"}}
    methods = {"BIG": True, "AGQ": True, "exact": False, "taus": [2]}
    more = {"slots": slots} if hybrid else {"ptq4sam": methods}
    scheme = make_scheme(4, 1, **more)
    model = insert_quantizers(sam, scheme)
    calibrate(model, items[:1])
    for name, unit in model_units(model):
        run = functools.partial(run_item, model, items[0])
        with torch.no_grad():
            inputs, target = capture_call(unit, run)
        for _, layer in quantized_layers(unit):
            layer.weight_quantizer.begin_learning(layer.weight)
        there = copy.deepcopy(unit).to(META)
        arguments, wanted = [x.to(META).requires_grad_() for x in inputs], target.to(META)
        for again in (False, True):
            with learning(there), FromHost() as watch:
                output_error(there(*arguments), wanted).backward()
            # What the first step brings is kept.
            assert not (again and watch.found), name
        for _, layer in quantized_layers(unit):
            layer.weight_quantizer.finish_learning()
