"""Clipping by what attentions look at, against maps computed from the float weights by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.errors import ConfigError
from ptq4sam.methods import pcc
from ptq4sam.methods.pcc import Pcc, mask_loss, mask_of, percentile_ranges
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, run_item
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
FIRST = "mask_decoder.transformer.layers.0.cross_attn_token_to_image"


def test_masks_and_losses() -> None:
    attention = torch.tensor([[[[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]]]])
    found = mask_of(attention.log() + 3, 0.5)
    assert found.tolist() == [[[[True, True, False], [True, True, True]]]]
    other = torch.tensor([[[[True, False, False], [True, True, True]]]])
    assert mask_loss(found, other) == pytest.approx(1 - 4 / 5)
    both = torch.cat([found, other], dim=1)
    assert mask_loss(both, torch.cat([found, found], dim=1)) == pytest.approx((0 + 1 / 5) / 2)
    nothing = torch.zeros_like(found)
    assert mask_loss(nothing, found) == 1


@pytest.mark.parametrize("count", [2, 7, 1000])
def test_percentiles_are_numpys(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    chosen = (0.85, 0.9, 0.999, 1.0)
    for percentile, (low, high) in zip(chosen, percentile_ranges(x, chosen), strict=True):
        expected = np.quantile(x.double().numpy(), [1 - percentile, percentile])
        assert [float(low), float(high)] == pytest.approx(expected.tolist(), abs=1e-5)
    # Rows have their own.
    rows = percentile_ranges(torch.stack([x, 3 * x]), chosen)
    for (low, high), alone in zip(rows, percentile_ranges(3 * x, chosen), strict=True):
        assert (low.shape, high.shape) == ((2,), (2,))
        assert (low[1], high[1]) == alone


def maps(exact: Sam, quantized: QuantizedSam, item: CalibrationItem) -> tuple[Tensor, Tensor]:
    """Logits of the first cross attention: by the float model, and with its query and key
    (and the inputs of their projections) quantized, on the inputs that the float model gives."""
    seen: list[tuple[Tensor, ...]] = []
    owner: Any = exact.get_submodule(FIRST)
    handle = owner.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    run_item(exact, item)
    handle.remove()
    given: Any = quantized.get_submodule(FIRST)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        split = (x.unflatten(-1, (owner.num_heads, -1)).transpose(1, 2) for x in (query, key))
        query, key = split
        return query @ key.transpose(-1, -2) * owner.core.scale

    query, key, _ = seen[0]
    expected = attend(owner.q_proj(query), owner.k_proj(key))
    linear = torch.nn.functional.linear
    query = linear(given.q_proj.input_quantizer(query), owner.q_proj.weight, owner.q_proj.bias)
    key = linear(given.k_proj.input_quantizer(key), owner.k_proj.weight, owner.k_proj.bias)
    return expected, attend(given.core.query_quantizer(query), given.core.key_quantizer(key))


@torch.no_grad()
def test_attentions_look_where_they_did(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
) -> None:
    # A few inputs far from the others, which observers cover.
    decoder: Any = sam.mask_decoder.transformer
    with torch.no_grad():
        decoder.layers[0].norm1.weight[0] *= 40
    scheme = make_scheme(4, ptq4sam={})
    losses = []
    for methods in ([], ["pcc"]):
        quantized = quantize_sam(sam, items[:1], scheme.with_overrides(f"methods={methods}"))
        exact, found = maps(sam, quantized, items[0])
        losses.append(mask_loss(mask_of(found, 0.5), mask_of(exact, 0.5)))
    assert losses[1] < 0.9 * losses[0]
    changed = quantized.applied["pcc"]
    assert any(name.startswith(f"{FIRST}: ") for name in changed)
    assert audit(quantized, lambda: forward(quantized)).findings == ()


def test_logits_of_a_part_tell_what_the_whole_attention_looks_at(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each loss against one of softmax outputs, for which the whole attention runs."""
    make = pcc.PccMethod._loss
    compared: dict[str, list[tuple[float, float]]] = {}

    def both(self: Any, parts: Any, slot: str, inputs: Any, goal: Any) -> Callable[[], float]:
        loss = make(self, parts, slot, inputs, goal)

        def noted() -> float:
            softmax: list[Tensor] = []
            handle = parts.core.softmax_quantizer.register_forward_pre_hook(
                lambda _module, given: softmax.append(given[0])
            )
            parts.owner(*inputs)
            handle.remove()
            (attention,) = softmax
            mask = attention > 0.5 * attention.amax(-1, keepdim=True)
            compared.setdefault(slot, []).append((loss(), mask_loss(mask, goal.wanted)))
            return compared[slot][-1][0]

        return noted

    monkeypatch.setattr(pcc.PccMethod, "_loss", both)
    quantize_sam(sam, items[:1], make_scheme(4, ptq4sam={}).with_overrides("methods=[pcc]"))
    assert len(compared) == 4
    for pairs in compared.values():
        found, expected = (torch.tensor(losses) for losses in zip(*pairs, strict=True))
        assert len(found.unique()) > 10
        # Nothing but what lies on the threshold may be judged otherwise.
        assert torch.allclose(found, expected, atol=1e-3)


def test_the_observed_ranges_stay_where_none_is_better(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At 8 bits with a single percentile that clips half of everything."""
    scheme = make_scheme(8, ptq4sam={})
    method = "methods={pcc: {percentiles: [0.51], passes: 1}}"
    with caplog.at_level("INFO", logger="ptq4sam.model.calibration"):
        quantized = quantize_sam(sam, items[:1], scheme.with_overrides(method))
    without = quantize_sam(sam, items[:1], scheme)
    if not quantized.applied["pcc"]:
        assert any(r.message == "pcc found nothing to change" for r in caplog.records)
    states = (model.state_dict() for model in (quantized, without))
    changed = sum(not torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    # Scale and zero point of each that it names.
    assert changed <= 2 * len(quantized.applied["pcc"])
    assert len(quantized.applied["pcc"]) < 7


def test_settings_are_checked() -> None:
    for wrong in ({"share": 1.0}, {"passes": 0}, {"percentiles": ()}):
        with pytest.raises(ConfigError, match="allowed"):
            Pcc(**wrong)  # type: ignore[arg-type]
