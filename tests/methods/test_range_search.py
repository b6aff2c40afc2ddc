"""Ranges by output errors weighed by squared gradients, against computations of another kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq4sam.errors import ConfigError
from ptq4sam.methods.range_search import RangeSearch, RangeSearchMethod, Searched
from ptq4sam.methods.task_gradients import drawn_loss, squared_gradients
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import (
    SOFTMAX,
    WEIGHT,
    observe_weights,
    quantized_layers,
    quantized_operators,
)
from ptq4sam.quantization.choices import parameters_of
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.quantization.slots import HEADS
from ptq4sam.sam.model import Sam
from tests.tiny_runs import SCHEMES

QUICK = {"steps": 12, "rounds": 2, "pictures": 2}


def scheme(name: str = "w4a4", **settings: object) -> Scheme:
    read = Scheme.from_yaml(SCHEMES / "tinysam" / f"{name}.yaml").to_dict()
    read["methods"] = {"range-search": {**QUICK, **settings}}
    return Scheme.from_dict({**read, "calibrate": 2, "float_weights": "float32"})


def test_drawn_gradients_are_the_second_derivative_of_the_divergence() -> None:
    """By draws, against the KL divergence of Bernoulli variables near its minimum."""
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    ious = torch.rand(2, 1, dtype=torch.float64) * 0.8 + 0.1
    mean = [torch.zeros_like(logits), torch.zeros_like(ious)]
    draws = 6000
    for seed in range(draws):
        given = logits.clone().requires_grad_(), ious.clone().requires_grad_()
        drawn_loss(*given, torch.Generator().manual_seed(seed)).backward()
        for total, x in zip(mean, given, strict=True):
            total += x.grad.square() / draws

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()

    step = 1e-3
    p = logits.sigmoid()
    apart = divergence(p, (logits + step).sigmoid()) / (3 * 4)
    assert torch.allclose(mean[0], 2 * apart / step**2, rtol=0.1)
    apart = divergence(ious, ious + step)
    assert torch.allclose(mean[1], 2 * apart / step**2, rtol=0.1)


def test_squared_gradients_are_those_of_finite_differences(
    sam: Sam,
    items: list[CalibrationItem],
) -> None:
    """Move single outputs of a layer of the float model and look at the loss."""
    name = "mask_decoder.transformer.layers.1.mlp.lin2"
    quantized = insert_quantizers(sam, scheme())
    item, module = items[0], quantized.get_submodule(name)
    found = squared_gradients(quantized, item.pixels, item.boxes, {name: module}, 3)[name]
    moved = torch.zeros(())

    def answered() -> tuple[Tensor, Tensor]:
        return sam.decode(sam.embed(item.pixels), None, item.boxes, None, True)

    leaves = tuple(x.detach().requires_grad_() for x in answered())
    drawn_loss(*leaves, torch.Generator().manual_seed(3)).backward()
    answers = [leaf.grad.double() for leaf in leaves]

    def loss() -> float:
        """Of the same drawn answers, with the likelihood that the float model gave them."""
        return sum(float((a * x.double()).sum()) for a, x in zip(answers, answered(), strict=True))

    handle = sam.get_submodule(name).register_forward_hook(lambda _m, _i, output: output + moved)
    with torch.no_grad():
        for place in ((0, 0, 0), (0, 2, 5), (0, 3, 31)):
            moved = torch.zeros(found.shape)
            moved[place] = 0.02
            higher = loss()
            moved = -moved
            slope = (higher - loss()) / 0.04
            assert float(found[place]) == pytest.approx(slope**2, rel=0.05, abs=1e-6)
    handle.remove()


def test_symmetric_scales_are_shares_of_the_largest_size() -> None:
    scale, zero = parameters_of(Grid(4, symmetric=True), torch.tensor(-0.5), torch.tensor(2.0))
    assert (float(scale), float(zero)) == (2.0 / 8, 0.0)
    scale, zero = parameters_of(Grid(4), torch.tensor(-0.5), torch.tensor(2.5))
    assert (float(scale), float(zero)) == (pytest.approx(0.2), 2.0)


def inputs_of(sam: Sam, name: str, items: list[CalibrationItem]) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = sam.get_submodule(name).register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    for item in items:
        run_item(sam, item)
    handle.remove()
    return seen


@pytest.mark.parametrize("metric", ["hessian", "error"])
def test_the_first_layer_has_what_a_search_by_hand_finds(
    sam: Sam,
    items: list[CalibrationItem],
    metric: str,
) -> None:
    """Of the encoder's first layer, whose inputs nothing before it changes: weight, then input."""
    name, steps = "image_encoder.blocks.0.attn.qkv", 60
    given = scheme(metric=metric, steps=steps, rounds=1, rows=10**6)
    found: Any = quantize_sam(sam, items[:2], given).get_submodule(name)
    quantized = insert_quantizers(sam, given)
    layer: Any = sam.get_submodule(name)
    xs = inputs_of(sam, name, items[:2])
    modules = {name: quantized.get_submodule(name)}
    gradients = [
        squared_gradients(quantized, item.pixels, item.boxes, modules, seed)[name]
        for seed, item in enumerate(items[:2])
    ]

    def points(x: Tensor, scale: float) -> Tensor:
        return (x / scale).round().clamp(-8, 7) * scale

    def searched(weights: list[Tensor]) -> tuple[float, float]:
        def loss(weight_scale: float, input_scale: float) -> float:
            total = 0.0
            moved = points(layer.weight, weight_scale)
            for x, weight in zip(xs, weights, strict=True):
                error = F.linear(points(x, input_scale), moved, layer.bias) - layer(x)
                total += float((weight.double() * error.double().square()).sum())
            return total

        largest = max(float(x.abs().max()) for x in xs)
        observed = 2 * largest / 15
        most = float(layer.weight.abs().max())
        tried = [2 * most / 15, *(share * most / 8 for share in shares)]
        weight_scale = min(tried, key=lambda scale: loss(scale, observed))
        tried = [observed, *(share * largest / 8 for share in shares)]
        return weight_scale, min(tried, key=lambda scale: loss(weight_scale, scale))

    shares = [0.01 + (1.2 - 0.01) * step / (steps - 1) for step in range(steps)]
    with torch.no_grad():
        expected = {
            "hessian": searched(gradients),
            "error": searched([torch.ones_like(x) for x in gradients]),
        }
    # Or this would not tell one metric from the other.
    assert expected["hessian"] != pytest.approx(expected["error"], rel=1e-3)
    scales = float(found.weight_quantizer.scale), float(found.input_quantizer.scale)
    assert scales == pytest.approx(expected[metric], rel=1e-5)


def test_channels_have_choices_of_their_own(sam: Sam, items: list[CalibrationItem]) -> None:
    """Of the neck's first convolution, from inputs of the model that is quantized before it."""
    name = "image_encoder.neck.0"
    given = scheme(steps=9, rounds=1, metric="error")
    found = quantize_sam(sam, items[:2], given)
    layer: Any = found.get_submodule(name)
    scales = layer.weight_quantizer.scale
    rows = sam.get_submodule(name).weight.flatten(1)
    widths = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    shares = scales * 15 / widths
    allowed = torch.tensor([1.0, *(0.01 + 1.19 * step / 8 for step in range(9))])
    assert (shares[:, None] - allowed).abs().amin(1).max() < 1e-4
    assert len(shares.mul(1e4).round().unique()) > 1

    # Each channel's error is the least of all shares, with the others as they are.
    x = inputs_of(found, name, items[:2])
    floats = inputs_of(sam, name, items[:2])
    low = min(float(part.min()) for part in floats)
    high = max(float(part.max()) for part in floats)
    scale, zero = Grid(4).affine_parameters(torch.tensor(low), torch.tensor(high))

    def points(value: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return ((value / s).round() + z).clamp(0, 15).sub(z) * s

    weight = sam.get_submodule(name).weight

    def errors(share: float) -> Tensor:
        s, z = Grid(4).affine_parameters(share * rows.amin(1), share * rows.amax(1))
        moved = points(rows, s[:, None], z[:, None]).reshape(weight.shape)
        return sum(
            (F.conv2d(points(p, scale, zero), moved) - F.conv2d(p, weight)).square().sum((0, 2, 3))
            for p in x
        )

    by_share = torch.stack([errors(float(share)) for share in allowed])
    chosen = (shares[:, None] - allowed).abs().argmin(1)
    taken = by_share.gather(0, chosen[None])[0]
    # Inputs before it were quantized as the search had them, but for whole-number arithmetic.
    assert (taken <= by_share.amin(0) * 1.02 + 1e-9).float().mean() > 0.9


def points_of_heads(x: Tensor, scale: Tensor) -> Tensor:
    """Of 4 bits, [batch, heads, n, d]."""
    scale = scale[:, None, None]
    return (x / scale).round().clamp(-8, 7) * scale


def test_heads_have_choices_of_their_own(sam: Sam, items: list[CalibrationItem]) -> None:
    """Of keys, whose turn comes when the queries have theirs: the least error of each head."""
    encoder: Any = sam.image_encoder
    attention = encoder.blocks[0].attn
    dim = attention.qkv.in_features
    with torch.no_grad():
        # A channel of the last head's keys far above the others.
        attention.qkv.weight[2 * dim - 1] *= 6
    found = quantize_sam(sam, items[:2], scheme(steps=9, rounds=1, metric="error", rows=10**6))
    allowed = torch.tensor([8 / 7.5, *(0.01 + 1.19 * step / 8 for step in range(9))])
    different = False
    for name in ("image_encoder.blocks.0.attn.core", "image_encoder.blocks.1.attn.core"):
        core: Any = found.get_submodule(name)
        seen: list[tuple[Tensor, ...]] = []
        handle = core.register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(x[:2]))
        for item in items[:2]:
            run_item(found, item)
        handle.remove()
        largest = torch.stack([key.abs().amax((0, 2, 3)) for _, key in seen]).amax(0)
        shares = core.key_quantizer.scale * 8 / largest
        chosen = (shares[:, None] - allowed).abs()
        assert chosen.amin(1).max() < 1e-3
        different |= len(chosen.argmin(1).unique()) > 1

        moved = [points_of_heads(query, core.query_quantizer.scale) for query, _ in seen]
        by_share = torch.stack(
            [
                sum(
                    (q @ points_of_heads(key, share * largest / 8).mT - query @ key.mT)
                    .square()
                    .sum((0, 2, 3))
                    for q, (query, key) in zip(moved, seen, strict=True)
                )
                for share in allowed
            ]
        )
        taken = by_share.gather(0, chosen.argmin(1)[None])[0]
        assert (taken <= by_share.amin(0) * 1.02).all()
    assert different


def test_a_better_metric_than_the_observed_range(
    sam: Sam,
    items: list[CalibrationItem],
    forward: Callable[[Sam], tuple[Tensor, ...]],
) -> None:
    """At 4 bits the masks come nearer to the float ones, audited; nothing of the float stays."""
    exact = forward(sam)[1]
    without = Scheme.from_dict({**scheme().to_dict(), "methods": {}})
    searched = quantize_sam(sam, items[:2], scheme(steps=40, rounds=1))
    errors = [
        float((forward(model)[1] - exact).norm())
        for model in (searched, quantize_sam(sam, items[:2], without))
    ]
    assert errors[0] < errors[1]
    report = audit(searched, lambda: forward(searched))
    assert report.passed, "\n".join(report.lines())
    changed = searched.applied["range-search"]
    assert any("output_upscaling" in name for name in changed)
    assert any("query_key" in name for name in changed)
    assert all(quantizer.mode is Mode.QUANTIZE for _, quantizer in quantizers(searched))


def test_two_searches_end_alike(sam: Sam, items: list[CalibrationItem]) -> None:
    first, second = (quantize_sam(sam, items[:2], scheme(steps=5, rounds=1)) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_held_weight_is_quantized_once_and_comes_back(sam: Sam) -> None:
    quantized = insert_quantizers(sam, scheme())
    observe_weights(quantized)
    for _, quantizer in quantizers(quantized):
        quantizer.mode = Mode.QUANTIZE
    name, layer = quantized_layers(quantized)[0]
    own, given = layer.weight.clone(), layer.weight_quantizer(layer.weight)
    assert not torch.equal(own, given)
    searched = Searched(name, layer, layer.products()[0], 9)
    with searched.held([], WEIGHT):
        assert torch.equal(layer.weight, given)
        assert layer.weight_quantizer.mode is Mode.FLOAT
    assert torch.equal(layer.weight, own)
    assert layer.weight_quantizer.mode is Mode.QUANTIZE


def test_hybrid_grids_are_chosen_by_it_too(
    sam: Sam,
    items: list[CalibrationItem],
    forward: Callable[[Sam], tuple[Tensor, ...]],
) -> None:
    given = scheme(steps=3, rounds=1).to_dict()
    given["slots"] = {**given["slots"], "input@after-gelu": {"grid": "hybrid"}}
    # The upscaling's input behind a GELU is a convolution's.
    given["upscaling"] = "float"
    found: QuantizedSam = quantize_sam(sam, items[:2], Scheme.from_dict(given))
    report = audit(found, lambda: forward(found))
    assert report.passed, "\n".join(report.lines())


@pytest.mark.parametrize("metric", ["overlap", "hessian"])
def test_pcc_has_the_metric_too(sam: Sam, items: list[CalibrationItem], metric: str) -> None:
    """Each attention's weighed error is no larger than with the observed ranges."""
    content = scheme().to_dict()
    content["methods"] = {"pcc": {"passes": 1, "metric": metric}}
    found = quantize_sam(sam, items[:1], Scheme.from_dict(content))
    content["methods"] = {}
    plain = quantize_sam(sam, items[:1], Scheme.from_dict(content))
    assert found.applied["pcc"]
    name = "mask_decoder.transformer.layers.0.self_attn"
    item = items[0]
    modules = {name: found.get_submodule(name)}
    weights = squared_gradients(found, item.pixels, item.boxes, modules, 0)[name]
    seen: list[tuple[Tensor, ...]] = []
    owner: Any = sam.get_submodule(name)
    handle = owner.register_forward_pre_hook(lambda _m, x: seen.append(x))
    run_item(sam, item)
    handle.remove()
    with torch.no_grad():
        target = owner(*seen[0])
        errors = []
        for model in (found, plain):
            part: Any = model.get_submodule(name)
            # Query and key alone, as they were chosen.
            for _, quantizer in quantizers(part):
                quantizer.mode = Mode.FLOAT
            for quantizer in (
                part.q_proj.input_quantizer,
                part.k_proj.input_quantizer,
                part.core.query_quantizer,
                part.core.key_quantizer,
            ):
                quantizer.mode = Mode.QUANTIZE
            for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
                part.get_submodule(layer).weight.copy_(owner.get_submodule(layer).weight)
            errors.append(float(((part(*seen[0]) - target).square() * weights).sum()))
    if metric == "hessian":
        assert errors[0] < errors[1]
    assert all(math.isfinite(error) for error in errors)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"metric": "hesian"}, "hessian, error"),
        ({"lowest": 0.0}, "above 0"),
        ({"lowest": 2.0}, "up to highest"),
        ({"steps": 0}, "1 or more"),
        ({"round": 2}, "did you mean 'rounds'"),
    ],
)
def test_bad_settings_are_told_in_one_line(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        scheme(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_schemes_are_tinysams(bits: int, sam: Sam) -> None:
    read = Scheme.from_yaml(SCHEMES / "tinysam" / f"w{bits}a{bits}.yaml")
    assert read.method_settings == {"range-search": RangeSearch()}
    assert (read.calibrate, read.recon, read.upscaling) == (8, None, "quantized")
    for name, operator in quantized_operators(insert_quantizers(sam, read)):
        of_convolution = operator.kind == "convolution"
        for slot, quantizer in operator.slots().items():
            without_sign = of_convolution or slot == SOFTMAX
            assert quantizer.grid == Grid(bits, symmetric=not without_sign), name
            axis = 0 if of_convolution and slot == "weight" else None
            axis = HEADS if slot in ("query", "key", "value") else axis
            assert getattr(quantizer, "channel_axis", None) == axis, (name, slot)
    assert RangeSearchMethod.settings_type is RangeSearch
