"""Both cross attentions of a block as one unit, against a block run by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4sam.methods.reconstruction import output_error
from ptq4sam.model import engine
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.plan import make_plan
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.sam.stages import run_stages
from ptq4sam.sam.transformer import TwoWayState

Forward = Callable[[Sam], tuple[Tensor, ...]]


def state(seed: int = 0) -> TwoWayState:
    generator = torch.Generator().manual_seed(seed)
    sides = (7, 64, 7, 64)
    return TwoWayState(*(torch.randn(2, n, 32, generator=generator) for n in sides))


def by_hand(block: Any, s: TwoWayState) -> tuple[Tensor, Tensor]:
    """Tokens and image behind a block's cross attentions (SAM, figure 14)."""
    queries, keys, query_pe, key_pe = s
    attended = block.cross_attn_token_to_image(queries + query_pe, keys + key_pe, keys)
    queries = block.norm2(queries + attended)
    queries = block.norm3(queries + block.mlp(queries))
    attended = block.cross_attn_image_to_token(keys + key_pe, queries + query_pe, queries)
    return queries, block.norm4(keys + attended)


@torch.no_grad()
def test_a_joint_unit_answers_with_both_sides_and_errs_by_their_sum(sam: Sam) -> None:
    block: Any = sam.mask_decoder.transformer.layers[1]
    _, joint = block.stages(joint=True)
    given, other = state(), state(1)
    queries, keys = by_hand(block, given)
    answer = joint.unit(*joint.enter(given))
    behind = TwoWayState(*joint.leave(given, answer))
    torch.testing.assert_close(behind.queries, queries)
    torch.testing.assert_close(behind.keys, keys)
    assert behind.query_pe is given.query_pe
    assert behind.key_pe is given.key_pe
    found = output_error(joint.unit(*other), answer)
    sides = [
        output_error(x, y) for x, y in zip(by_hand(block, other), (queries, keys), strict=True)
    ]
    assert float(found) == pytest.approx(float(sum(sides)), rel=1e-5)


@torch.no_grad()
def test_a_transformer_of_joint_units_is_the_same(sam: Sam) -> None:
    transformer = sam.mask_decoder.transformer
    names = [stage.name for stage in transformer.stages(joint=True)]
    assert names == [
        *("layers.0.self_attn", "layers.0.cross_attentions"),
        *("layers.1.self_attn", "layers.1.cross_attentions"),
        "final_attn_token_to_image",
    ]
    ours, theirs = (run_stages(transformer.stages(joint=j), state()) for j in (True, False))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_all_of_a_joint_unit_is_learned_at_once(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: dict[str, set[str]] = {}
    right = engine.reconstruct_unit

    def record(name: str, unit: torch.nn.Module, weights: Any, *args: Any, **more: Any) -> Any:
        before = {n: q.scale.detach().clone() for n, q in quantizers(unit)}
        losses = right(name, unit, weights, *args, **{**more, "fall_back": False})
        moved = {n for n, q in quantizers(unit) if not torch.equal(q.scale, before[n])}
        learned[name] = {n.partition(".")[0] for n in moved}
        return losses

    monkeypatch.setattr(engine, "reconstruct_unit", record)
    scheme = make_scheme(4, 3, recon={"granularity": "joint", "scale_lr": 1e-3})
    quantized = quantize_sam(sam, items[:2], scheme)
    plan = make_plan(sam, items[:2], scheme, quantize_encoder=True, budget=10**9)
    assert [unit.name for unit in plan.units] == list(learned)
    together = learned["mask_decoder.transformer.layers.0.cross_attentions"]
    assert together == {"cross_attn_token_to_image", "mlp", "cross_attn_image_to_token"}
    assert audit(quantized, lambda: forward(quantized)).findings == ()


def test_defects_of_published_code_are_those_of_a_joint_unit(
    sam: Sam, items: list[CalibrationItem], make_scheme: Callable[..., Scheme]
) -> None:
    scheme = make_scheme(4, 3, recon={"granularity": "joint"}, compat="published")
    quantized = quantize_sam(sam, items[:2], scheme)
    block = quantized.mask_decoder.transformer.layers[0]
    # Only the first layer of what is learned at once is rounded hard.
    soft = [n for n, q in quantizers(block) if getattr(q, "rounding", "") == "soft"]
    hard = [n for n, q in quantizers(block) if getattr(q, "rounding", "") == "hard"]
    first = ("self_attn.q_proj", "cross_attn_token_to_image.q_proj")
    assert hard == [f"{name}.weight_quantizer" for name in first]
    assert len(soft) == 3 * 4 + 2 - 2
