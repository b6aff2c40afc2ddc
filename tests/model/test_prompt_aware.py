"""Units that learn by the image behind the decoder, against forwards and a loop made by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import ConfigError
from ptq4sam.methods import reconstruction
from ptq4sam.methods.reconstruction import UnitData, UnitLosses, reconstruct_unit
from ptq4sam.model import engine
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem, calibrate
from ptq4sam.model.engine import reconstruct
from ptq4sam.model.insertion import ENCODER, insert_quantizers, model_units
from ptq4sam.model.prompt_aware import PromptAware
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests import plain_reconstruction as plain

MakeScheme = Callable[..., Scheme]
Items = list[CalibrationItem]
PROMPT_AWARE = {"granularity": "joint", "loss": "prompt-aware"}
UNIT = "blocks.0.mlp"
BLOCK = "mask_decoder.transformer.layers.0"


def image_behind(sam: Sam, x: Tensor, boxes: Tensor) -> Tensor:
    """The decoder's image [boxes, cells, dim], from what a block [1, rows, columns, dim] gives."""
    embedding = sam.image_encoder.neck(x.permute(0, 3, 1, 2))
    sparse, dense = sam.prompt_encoder(boxes=boxes)
    decoder = sam.mask_decoder
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.expand(len(boxes), -1, -1), sparse], dim=1)
    positions = sam.prompt_encoder.dense_positions()
    return cast(Tensor, decoder.transformer(embedding + dense, positions, tokens)[1])


def scheme_of(make_scheme: MakeScheme, steps: int, **more: Any) -> Scheme:
    scheme = make_scheme(4, steps, recon={**PROMPT_AWARE, **more})
    return scheme.with_overrides("ptq4sam.AGQ=false")


def test_a_unit_is_learned_by_what_the_decoder_makes_of_it(
    sam: Sam, items: Items, make_scheme: MakeScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, as in tests/model/test_reconstruction_wiring.py.

    It fails, as was tried, where the residual around the unit is left out.
    """
    settings = plain.Settings(60, rounding_rate=0.02, scale_rate=1e-3)
    scheme = scheme_of(make_scheme, settings.steps, rounding_lr=0.02, scale_lr=1e-3)
    ours = insert_quantizers(sam, scheme)
    calibrate(ours, items)
    exact = copy.deepcopy(sam).double()
    ours.double()
    for model in (exact, ours):
        # Its positions are float32 whatever the rest is.
        model.prompt_encoder.float()
    stages = {stage.name: stage for stage in ours.image_encoder.stages()}
    pixels = [item.pixels.double() for item in items]
    with torch.no_grad():
        states = []
        for each in pixels:
            (x,) = exact.image_encoder.begin(each)
            attention = exact.image_encoder.stages()[0]
            states.append(attention.run((x,))[0])
    boxes = [item.boxes.double() for item in items]
    block: Any = exact.image_encoder.blocks[0]

    def wanted(x: Tensor, its: Tensor) -> Tensor:
        return image_behind(exact, x + block.mlp(block.norm2(x)), its)

    def forward(unit: plain.Quantized, arguments: tuple[Tensor, ...]) -> Tensor:
        x, its = arguments
        return image_behind(exact, x + plain.mlp(unit, (block.norm2(x),)), its)

    with torch.no_grad():
        targets = [wanted(x, its) for x, its in zip(states, boxes, strict=True)]
    given = [(x, its) for x, its in zip(states, boxes, strict=True)]
    noisy = [(x + 0.05 * x.roll(1, 2), its) for x, its in given]
    with quantizer_mode(ours, Mode.FLOAT):
        begun = ours.image_encoder.begin(pixels[0].float())
        begun = tuple(x.double() for x in begun)
        judged = PromptAware(ours, begun).judged(ENCODER, stages[UNIT])
    assert judged is not None
    unit = cast(nn.Module, judged.unit)
    theirs = plain.Quantized(unit.state_dict(), 4)
    outcome = plain.reconstruct(
        theirs, forward, plain.Data(noisy, given, targets), settings, generator()
    )
    monkeypatch.setattr(reconstruction, "mean_error", lambda *_arguments: 0.0)
    assert scheme.recon is not None
    losses = reconstruct_unit(
        UNIT,
        judged,
        [(layer.weight, layer.weight_quantizer) for _, layer in quantized_layers(judged)],
        UnitData(noisy, given, [(target,) for target in targets]),
        scheme.recon,
        generator(),
        fall_back=False,
    )
    assert losses.curve == pytest.approx(outcome.losses, rel=1e-6)
    moved = 0.0
    for layer, alpha in outcome.alphas.items():
        found = unit.get_submodule(f"{layer}.weight_quantizer").alpha
        # Positions of boxes are float32.
        torch.testing.assert_close(found, alpha, rtol=0, atol=1e-3)
        first = plain.Quantized(theirs.state, 4).alphas[layer]
        moved = max(moved, float((alpha - first).detach().abs().max()))
    assert moved > 0.1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def test_who_learns_by_what(
    sam: Sam,
    items: Items,
    make_scheme: MakeScheme,
    forward: Callable[[Sam], tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Encoder: images behind the decoder; joint units: image and a tenth of the tokens."""
    seen: dict[str, tuple[nn.Module, list[Tensor]]] = {}

    def record(
        name: str, unit: nn.Module, weights: Any, data: UnitData, *rest: Any, **more: Any
    ) -> UnitLosses:
        seen[name] = (unit, [target for (target,) in data.targets])
        return reconstruct_unit(name, unit, weights, data, *rest, **more)

    monkeypatch.setattr(engine, "reconstruct_unit", record)
    scheme = scheme_of(make_scheme, 3)
    quantized = quantize_sam(sam, items[:2], scheme)
    assert [*seen] == [name for name, _ in model_units(quantized, joint=True)]
    with torch.no_grad():
        for name, (_, targets) in seen.items():
            if not name.startswith(ENCODER) or name.endswith("neck"):
                continue
            index, part = int(name.split(".")[2]), name.split(".")[3]
            for item, target in zip(items[:2], targets, strict=True):
                (x,) = sam.image_encoder.begin(item.pixels)
                for stage in sam.image_encoder.stages()[: 2 * index + 1 + (part == "mlp")]:
                    (x,) = stage.run((x,))
                wanted = image_behind(sam, x, item.boxes)
                torch.testing.assert_close(target, wanted, rtol=1e-3, atol=1e-3)
        neck = seen[f"{ENCODER}.neck"][1][0]
        wanted = whole(sam, items[0])
        torch.testing.assert_close(neck, wanted, rtol=1e-3, atol=1e-3)
        tokens_and_image = seen[f"{BLOCK}.cross_attentions"][1][0]
        block: Any = sam.mask_decoder.transformer.layers[0]
        state = begun(sam, items[0])
        for stage in block.stages():
            state = stage.run(state)
        wanted = torch.cat([state[0] / 10, state[1]], dim=1)
        torch.testing.assert_close(tokens_and_image, wanted, rtol=1e-3, atol=1e-3)
    for name in (f"{BLOCK}.self_attn", "mask_decoder.transformer.final_attn_token_to_image"):
        assert seen[name][0] is quantized.get_submodule(name)
    assert audit(quantized, lambda: forward(quantized)).findings == ()


def begun(sam: Sam, item: CalibrationItem) -> tuple[Tensor, ...]:
    sparse, dense = sam.prompt_encoder(boxes=item.boxes)
    positions = sam.prompt_encoder.dense_positions()
    return sam.mask_decoder.begin(sam.embed(item.pixels)[0], positions, sparse, dense)


def whole(sam: Sam, item: CalibrationItem) -> Tensor:
    (x,) = sam.image_encoder.begin(item.pixels)
    for stage in sam.image_encoder.stages()[:-1]:
        (x,) = stage.run((x,))
    return image_behind(sam, x, item.boxes)


def test_behind_a_float_encoder_only_the_decoder_learns(
    sam: Sam, items: Items, make_scheme: MakeScheme
) -> None:
    scheme = scheme_of(make_scheme, 3)
    ours = insert_quantizers(sam, scheme, quantize_encoder=False)
    calibrate(ours, items[:2])
    before = copy.deepcopy(ours.mask_decoder.state_dict())
    assert scheme.recon is not None
    reconstruct(ours, items[:2], scheme.recon)
    after = ours.mask_decoder.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("wrong", [{"granularity": "unit"}, {"batch_size": 2}])
def test_what_it_needs_is_said(make_scheme: MakeScheme, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"recon\.loss: prompt-aware given"):
        make_scheme(4, 3, recon={**PROMPT_AWARE, **wrong})
