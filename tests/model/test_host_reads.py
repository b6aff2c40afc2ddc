"""How often the host waits for a number: a GPU stands idle meanwhile."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4sam.methods import reconstruction
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.arithmetic import learning
from ptq4sam.quantization import int8_products
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.device_watch import host_reads

MakeScheme = Callable[..., Scheme]
Items = list[CalibrationItem]
BOXES = torch.tensor([[5.0, 6, 40, 50], [20, 10, 60, 30]])


@torch.no_grad()
def run(sam: Sam, pixels: Tensor) -> tuple[Tensor, Tensor]:
    features = sam.embed(pixels)
    return features[0], sam.decode(features, None, BOXES, None, True)[0]


METHODS = {"BIG": True, "AGQ": True, "exact": False, "taus": [2]}


def quick(make_scheme: MakeScheme, bits: int = 4, **more: object) -> Scheme:
    """A scheme whose calibration takes no time."""
    return make_scheme(bits, ptq4sam=METHODS, **more)


@pytest.fixture
def quantized(quantize: Callable[..., QuantizedSam]) -> QuantizedSam:
    return quantize(4, 1, ptq4sam=METHODS)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "_asks_for_free", lambda _x: False)


@pytest.fixture
def learning_reads(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What the host read while each unit learned."""
    optimize, found = reconstruction._optimize, []

    def watched(*arguments: Any) -> list[float]:
        with host_reads() as reads:
            errors = optimize(*arguments)
        found.append(reads)
        return errors

    monkeypatch.setattr(reconstruction, "_optimize", watched)
    return found


@pytest.mark.parametrize("recon", [{}, {"weights_only": True}, {"drop_prob": 0.0}])
def test_a_step_reads_nothing(
    sam: Sam,
    items: Items,
    make_scheme: MakeScheme,
    recon: dict[str, object],
    learning_reads: list[Counter[str]],
) -> None:
    """Of all kinds of units: only which pictures are taken, before, and the losses, at the end."""
    scheme = quick(make_scheme, recon={"iters": 3, "batch_size": 1, **recon})
    quantized = quantize_sam(sam, items[:1], scheme)
    assert len(learning_reads) == len(model_units(quantized))
    assert {reads.total() for reads in learning_reads} == {2}


def test_the_watch_counts_what_a_step_reads(
    sam: Sam,
    items: Items,
    make_scheme: MakeScheme,
    learning_reads: list[Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_error = reconstruction._step_error

    def reading(*arguments: Any) -> Tensor:
        error = step_error(*arguments)
        assert error.detach() >= 0
        return error

    monkeypatch.setattr(reconstruction, "_step_error", reading)
    quantize_sam(sam, items[:1], quick(make_scheme, steps=3), quantize_encoder=False)
    assert {reads.total() for reads in learning_reads} == {2 + 3}


@pytest.mark.parametrize("bits", [4, 8, 10])
def test_a_frozen_forward_reads_nothing(
    sam: Sam, items: Items, make_scheme: MakeScheme, bits: int, as_on_a_gpu: None
) -> None:
    """Once it has asked what follows from its parameters."""
    quantized = quantize_sam(sam, items[:1], quick(make_scheme, bits))
    with host_reads() as found:
        first = run(quantized, items[0].pixels)
    assert found
    with host_reads() as found:
        second = run(quantized, items[0].pixels)
        run(quantized, items[1].pixels)
    assert not found
    assert all(map(torch.equal, first, second))


def learn_again(sam: QuantizedSam) -> None:
    quantizer = sam.image_encoder.blocks[0].attn.qkv.weight_quantizer
    quantizer.begin_learning(sam.image_encoder.blocks[0].attn.qkv.weight)
    with torch.no_grad():
        quantizer.alpha.neg_()
    quantizer.finish_learning()


def learn_scales(sam: QuantizedSam) -> None:
    """By an optimiser whose steps torch does not count."""
    attention = sam.image_encoder.blocks[1].attn
    learned = [
        attention.core.query_quantizer.scale,
        attention.core.softmax_quantizer.scale,
        attention.proj.input_quantizer.scale,
    ]
    for scale in learned:
        scale.requires_grad_()
    x = torch.randn(1, 8, 8, 32, generator=torch.Generator().manual_seed(0))
    with learning(attention):
        attention(x).square().sum().backward()
    before = [scale._version for scale in learned]
    torch.optim.Adam(learned, lr=0.01, fused=True).step()
    assert before == [scale._version for scale in learned]
    for scale in learned:
        scale.requires_grad_(False)


def load_other_state(sam: QuantizedSam) -> None:
    state = {name: value.clone() for name, value in sam.state_dict().items()}
    for name, value in state.items():
        if name.endswith((".scale", "rel_pos_h", "patch_embed.proj.weight")):
            value.mul_(1.25)
    sam.load_state_dict(state)


@torch.no_grad()
def other_softmax_scale(sam: QuantizedSam) -> None:
    sam.image_encoder.blocks[1].attn.core.softmax_quantizer.scale.mul_(0.5)


def other_zero_point(sam: QuantizedSam) -> None:
    quantizer = sam.image_encoder.blocks[0].mlp.lin1.input_quantizer
    quantizer._set_parameters(quantizer.scale.detach() * 1.5, quantizer.zero_point + 1)


@torch.no_grad()
def other_positions(sam: QuantizedSam) -> None:
    sam.image_encoder.blocks[1].attn.rel_pos_w.mul_(1.5)


@torch.no_grad()
def other_convolution(sam: QuantizedSam) -> None:
    sam.image_encoder.neck[2].weight.neg_()


def other_weight_data(sam: QuantizedSam) -> None:
    weight = sam.mask_decoder.transformer.layers[0].mlp.lin1.weight
    weight.data = -weight.data


@pytest.mark.parametrize(
    "change",
    [
        learn_again,
        learn_scales,
        load_other_state,
        other_softmax_scale,
        other_zero_point,
        other_positions,
        other_convolution,
        other_weight_data,
    ],
)
def test_what_is_kept_is_forgotten_when_parameters_change(
    quantized: QuantizedSam, items: Items, change: Callable[[QuantizedSam], None]
) -> None:
    before = run(quantized, items[0].pixels)
    change(quantized)
    # A copy has kept nothing.
    expected = run(copy.deepcopy(quantized), items[0].pixels)
    after = run(quantized, items[0].pixels)
    assert all(map(torch.equal, after, expected))
    assert not all(map(torch.equal, after, before))
