"""Units that learn by what masks are made of, not by their own answers (PAR of SAQ-SAM, AAAI 2026).

What a unit of the image encoder gives goes, in float, through what lies behind the encoder's
blocks and through the decoder's two-way transformer with some of the picture's boxes; its error is
that of the image behind it. A unit with both cross attentions of a decoder's block errs by the
image and by a small share of the tokens. Nothing but the unit learns.

Published code leaves out the regulariser of the rounding and most of the hardening, so that its
weights stay nearly float; here both are as in every other reconstruction. There a unit of the
encoder is all blocks up to one with global attention.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.model.insertion import ENCODER, QuantizedSam
from ptq4sam.operators.arithmetic import learning
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.sam.stages import Stage, State, run_stages
from ptq4sam.sam.transformer import CrossAttentions, TwoWayState

_log = logging.getLogger(__name__)

BOXES = 16
"""Of a picture, the first so many."""
TOKENS = 0.01
"""Share of the tokens' squared error beside the image's."""


class ThroughDecoder(nn.Module):
    """A unit of the encoder that answers with the image [boxes, cells, dim] behind the decoder.

    Its arguments are the state before the unit, and boxes [n, 4].

    Args:
        stage: the unit.
        rest: stages of the encoder that its state goes through.
        sam: whose they are; but for the unit, its quantizers are off.
    """

    def __init__(self, stage: Stage, rest: Sequence[Stage], sam: QuantizedSam) -> None:
        super().__init__()
        self.unit = stage.unit
        # In a tuple, so that nothing of it is the unit's to learn.
        self._others = (stage, tuple(rest), sam)

    def forward(self, *arguments: Tensor) -> Tensor:
        """The unit in its place, with what is behind it in float."""
        *state, boxes = arguments
        stage, rest, sam = self._others
        behind = stage.run(tuple(state))
        with ExitStack() as stack:
            for module in (*(s.unit for s in rest), sam.transformer):
                stack.enter_context(quantizer_mode(module, Mode.FLOAT))
                stack.enter_context(learning(module))
            embedding, *_ = run_stages(rest, behind)
            sparse, dense = sam.prompt_encoder(boxes=boxes)
            positions = sam.prompt_encoder.dense_positions()
            return sam.mask_decoder.attend(embedding, positions, sparse, dense)[1]


class BothSides(nn.Module):
    """Both cross attentions of a block, which answer with the image and a share of the tokens.

    Args:
        stage: the unit.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.unit = stage.unit
        self._stage = stage

    def forward(self, *state: Tensor) -> Tensor:
        """Tokens and image [boxes, n + m, dim], the former by the root of their share."""
        behind = TwoWayState(*self._stage.run(state))
        return torch.cat([TOKENS**0.5 * behind.queries, behind.keys], dim=1)


class PromptAware:
    """Which units learn so.

    Args:
        sam: the model.
        state: float, before the encoder's first stage on a picture; None where the encoder is not
            quantized.
    """

    def __init__(self, sam: QuantizedSam, state: State | None) -> None:
        self._sam = sam
        self._rest: dict[str, Sequence[Stage]] = {}
        if state is not None:
            self._rest = _behind_blocks(sam, state)

    def judged(self, path: str, stage: Stage) -> nn.Module | None:
        """A unit with what it learns by; None for one that learns by its own answer.

        Args:
            path: of the network.
            stage: of it.
        """
        if path == ENCODER:
            rest = self._rest.get(stage.name)
            return None if rest is None else ThroughDecoder(stage, rest, self._sam)
        return BothSides(stage) if isinstance(stage.unit, CrossAttentions) else None


@torch.no_grad()
def _behind_blocks(sam: QuantizedSam, state: State) -> dict[str, Sequence[Stage]]:
    """By name of a stage, those that its state goes through, where their input is like it."""
    encoder: Any = sam.image_encoder
    stages: list[Stage] = encoder.stages()
    patterns = sam.description.blocks
    of_blocks = [
        place
        for place, stage in enumerate(stages)
        if any(re.match(pattern, f"{ENCODER}.{stage.name}") for pattern in patterns)
    ]
    first = max(of_blocks, default=-1) + 1
    shapes = []
    with quantizer_mode(encoder, Mode.FLOAT):
        for stage in stages[:first]:
            state = stage.run(state)
            shapes.append([x.shape for x in state])
    found: dict[str, Sequence[Stage]] = {}
    for place, stage in enumerate(stages):
        if place >= first - 1:
            found[stage.name] = stages[place + 1 :]
        elif shapes[place] == shapes[-1]:
            found[stage.name] = stages[first:]
    if others := len(stages) - len(found):
        _log.info(
            "prompt-aware: %d of %d units of the encoder learn by their own answers, which what is "
            "behind the blocks cannot take",
            others,
            len(stages),
        )
    return found
