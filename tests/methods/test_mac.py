"""Corrections of attentions against least squares problems written out element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import ConfigError
from ptq4sam.methods import mac
from ptq4sam.methods.mac import Call, Mac, Sums, add_call
from ptq4sam.methods.pcc import AttentionParts
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.attention import QuantizedSoftmaxAttention, SoftmaxAttention
from ptq4sam.operators.base import observe_weights
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.transformer import Attention

Forward = Callable[[Sam], tuple[Tensor, ...]]
HEADS, WIDTH, TOKENS = 2, 3, {"query": 7, "key": 5, "value": 5}
SOLVED = 1e-3


def attention(bits: int = 4) -> tuple[Any, AttentionParts]:
    """A quantized attention of the decoder with random weights."""
    torch.manual_seed(0)
    owner: Any = Attention(6, HEADS)
    for parameter in owner.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = AdaRoundQuantizer(Grid(bits), channel_axis=0)
        layer = QuantizedLinear(getattr(owner, name), weight, FixedQuantizer(Grid(bits)))
        setattr(owner, name, layer)
    four = (FixedQuantizer(Grid(bits)) for _ in range(4))
    owner.core = QuantizedSoftmaxAttention(SoftmaxAttention(WIDTH**-0.5), *four)
    owner.requires_grad_(False)
    return owner, AttentionParts(owner, owner.q_proj, owner.k_proj, owner.v_proj, owner.core)


def call_of(prompts: int, *, exact_inputs: bool) -> tuple[Call, AttentionParts]:
    """A call of a calibrated attention."""
    owner, parts = attention()
    generator = torch.Generator().manual_seed(1)
    inputs = {r: torch.randn(prompts, n, 6, generator=generator) for r, n in TOKENS.items()}
    observe_weights(owner)
    activations = [q for n, q in quantizers(owner) if not n.endswith("weight_quantizer")]
    with quantizer_mode(owner, Mode.OBSERVE):
        owner(*inputs.values())
    assert all(q.is_calibrated for q in activations)
    exact = {}
    with quantizer_mode(owner, Mode.FLOAT):
        for role, layer in zip(TOKENS, (parts.query, parts.key, parts.value), strict=True):
            exact[role] = owner.split_heads(layer(inputs[role]))
    if exact_inputs:
        for layer in (parts.query, parts.key, parts.value):
            # So fine that nothing of it is seen.
            layer.input_quantizer = FixedQuantizer(Grid(16))
            with quantizer_mode(layer.input_quantizer, Mode.OBSERVE):
                layer.input_quantizer(torch.cat([x.flatten(0, 1) for x in inputs.values()]))
    return Call(parts, exact, inputs), parts


def sums_of(call: Call, role: str) -> Sums:
    nothing = torch.zeros(())
    sums = Sums(nothing, nothing, nothing)
    add_call(sums, call, role)
    return sums


@pytest.mark.parametrize("role", ["query", "key"])
def test_the_published_equation_is_solved_where_inputs_are_exact(role: str) -> None:
    """r G^-1 d + d K'^T K' = -W (K' - K)^T K', without biases (CAR-SAM), keys around zero."""
    call, parts = call_of(1, exact_inputs=True)
    layer = parts.query if role == "query" else parts.key
    other = "key" if role == "query" else "query"
    for head in range(HEADS):
        moved, exact = call.quantized(other)[0, head].double(), call.exact[other][0, head].double()
        x = call.moved_input(role)[0].double()
        if role == "query":
            moved, exact = moved - moved.mean(0), exact - exact.mean(0)
        else:
            x = x - x.mean(0)
        sums = sums_of(call, role)
        found = sums.solution(SOLVED)[head]
        gram, small = x.t() @ x, moved.t() @ moved
        ridge = SOLVED * float(
            torch.linalg.eigvalsh(gram).mean() * torch.linalg.eigvalsh(small).mean()
        )
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        # The bias is a row of the weight whose input is 1 and that is not corrected.
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        weight = layer.weight[rows].double().t()
        constant = x.t() @ ones @ layer.bias[rows].double()[None]
        wanted = -(gram @ weight + constant) @ (moved - exact).t() @ moved
        torch.testing.assert_close(
            ridge * found + gram @ found @ small, wanted, rtol=1e-3, atol=1e-2
        )


@pytest.mark.parametrize("role", ["query", "key"])
def test_a_correction_leaves_the_least_error_of_logits(role: str) -> None:
    call, parts = call_of(1, exact_inputs=False)
    found = sums_of(call, role).solution(SOLVED).numpy()
    other = "key" if role == "query" else "query"
    layer = parts.query if role == "query" else parts.key
    x = layer.input_quantizer(call._inputs[role])[0].double().numpy()
    given = x
    now = given @ layer.weight.double().numpy().T + layer.bias.double().numpy()
    for head in range(HEADS):
        x, rows = given, slice(head * WIDTH, (head + 1) * WIDTH)
        moved = call.quantized(other)[0, head].double().numpy()
        exact = {r: call.exact[r][0, head].double().numpy() for r in (role, other)}
        rest = exact[role] @ exact[other].T - now[:, rows] @ moved.T
        # A softmax does not see what is common to all keys.
        keys = 1 if role == "query" else 0
        rest = rest - rest.mean(keys, keepdims=True)
        if role == "query":
            moved = moved - moved.mean(0)
        else:
            x = x - x.mean(0)
        # One row for each logit, one unknown for each weight of the head, and rows for the ridge.
        problem = np.array([np.kron(a, b) for a in x for b in moved])
        ridge = (
            SOLVED
            * np.mean(np.linalg.eigvalsh(x.T @ x))
            * np.mean(np.linalg.eigvalsh(moved.T @ moved))
        )
        unknown = problem.shape[1]
        stacked = np.vstack([problem, np.sqrt(ridge) * np.eye(unknown)])
        target = np.concatenate([rest.ravel(), np.zeros(unknown)])
        expected = np.linalg.lstsq(stacked, target, rcond=None)[0].reshape(6, WIDTH)
        np.testing.assert_allclose(found[head], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("queries", [7, 4])
def test_values_are_corrected_by_ridge_regression(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOKENS, "query", queries)
    call, parts = call_of(3, exact_inputs=False)
    found = sums_of(call, "value").solution(SOLVED).numpy()
    x = parts.value.input_quantizer(call._inputs["value"]).double().numpy()
    now = x @ parts.value.weight.double().numpy().T + parts.value.bias.double().numpy()
    for head in range(HEADS):
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        query, key, value = (call.exact[r][:, head] for r in ("query", "key", "value"))
        wanted = (query @ key.transpose(1, 2) * WIDTH**-0.5).softmax(-1) @ value
        moved = (
            parts.core.quantizer("softmax")(
                (
                    call.quantized("query")[:, head]
                    @ call.quantized("key")[:, head].transpose(1, 2)
                    * WIDTH**-0.5
                ).softmax(-1)
            )
            .double()
            .numpy()
        )
        seen = np.concatenate([a @ b for a, b in zip(moved, x, strict=True)])
        rest = np.concatenate(
            [
                w - a @ n[:, rows]
                for w, a, n in zip(wanted.double().numpy(), moved, now, strict=True)
            ]
        )
        # The mean over prompts of Gram matrices, whose trace is shared by all of its directions.
        ridge = SOLVED * np.trace(seen.T @ seen) / 6
        stacked = np.vstack([seen, np.sqrt(ridge) * np.eye(6)])
        target = np.vstack([rest, np.zeros((6, WIDTH))])
        expected = np.linalg.lstsq(stacked, target, rcond=None)[0]
        np.testing.assert_allclose(found[head], expected, rtol=1e-3, atol=1e-5)


def logits_error(exact: Sam, quantized: QuantizedSam, given: list[CalibrationItem]) -> float:
    """Of all attentions of the decoder on what the float model gives them."""
    total = []
    names = [n for n, m in exact.named_modules() if isinstance(m, Attention) and "decoder" in n]

    def compare(name: str, owner: Any, inputs: tuple[Tensor, ...]) -> None:
        query, key, _ = inputs
        moved: Any = quantized.get_submodule(name)
        wanted = owner.split_heads(owner.q_proj(query)), owner.split_heads(owner.k_proj(key))
        q = moved.core.query_quantizer(owner.split_heads(moved.q_proj(query)))
        k = moved.core.key_quantizer(owner.split_heads(moved.k_proj(key)))
        wanted_logits = wanted[0] @ wanted[1].transpose(-1, -2)
        error = q @ k.transpose(-1, -2) - wanted_logits
        error = (error - error.mean(-1, keepdim=True)).square().sum()
        total.append(float(error / wanted_logits.var(correction=0)))

    handles = [
        exact.get_submodule(name).register_forward_pre_hook(
            lambda owner, inputs, name=name: compare(name, owner, inputs)
        )
        for name in names
    ]
    for item in given:
        run_item(exact, item)
    for handle in handles:
        handle.remove()
    assert len(total) >= 7
    return sum(total)


@torch.no_grad()
def test_a_model_is_corrected_and_frozen(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
) -> None:
    scheme = make_scheme(4, ptq4sam={})
    without = quantize_sam(sam, items[:2], scheme)
    quantized = quantize_sam(sam, items[:2], scheme.with_overrides("methods=[mac]"))
    changed = quantized.applied["mac"]
    assert {name.rpartition(": ")[2] for name in changed} == {"query", "key", "value"}
    assert logits_error(sam, quantized, items[:2]) < 0.95 * logits_error(sam, without, items[:2])
    assert audit(quantized, lambda: forward(quantized)).findings == ()
    held = [n for n, v in quantized.state_dict().items() if n.endswith(".correction") and v.numel()]
    assert held == []


def test_what_becomes_worse_goes_without_and_that_is_said(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme = make_scheme(4, ptq4sam={})
    right = mac.Sums.solution
    monkeypatch.setattr(mac.Sums, "solution", lambda sums, ridge: -3 * right(sums, ridge))
    with caplog.at_level("INFO", logger="ptq4sam.methods.mac"):
        quantized = quantize_sam(sam, items[:1], scheme.with_overrides("methods=[mac]"))
    without = quantize_sam(sam, items[:1], scheme)
    said = [r.message for r in caplog.records if r.message.startswith("mac leaves ")]
    assert len(said) + len(quantized.applied["mac"]) == 3 * 7
    assert len(said) > 15
    for name, layer in without.mask_decoder.named_modules():
        role = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.get(name.rpartition(".")[2])
        owner = f"mask_decoder.{name}".rpartition(".")[0]
        if role is not None and any(m.startswith(f"mac leaves {owner}: {role} ") for m in said):
            theirs: Any = quantized.mask_decoder.get_submodule(name)
            assert torch.equal(theirs.weight, layer.weight), name


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        Mac(ridge=0)
