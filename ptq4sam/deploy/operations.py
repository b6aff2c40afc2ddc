"""The operations of a SAM, counted on the meta device: no weight is made, nothing computed.

Counted are multiply-accumulates: of layers with weights, of the two products of every attention, of
relative positions, of the hypernetworks' product with the upscaled embedding. Windows count with
their padding, which is computed like the rest. Not counted is what has no multiplication of two
operands: norms, softmax, activation functions, sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.operators.base import WORK, Work, as_operator
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.sam.model import Sam

FLOAT_BITS = 32


@dataclass(frozen=True)
class Operation:
    """One layer or product.

    Attributes:
        part: what it belongs to.
        name: its path in the model.
        macs: multiply-accumulates.
        bits: of its two operands.
        read: elements and bits of each activation that it reads.
    """

    part: str
    name: str
    macs: int
    bits: tuple[int, int]
    read: tuple[tuple[int, int], ...]


@torch.no_grad()
def operations(sam: Sam, boxes: int = 1) -> list[Operation]:
    """Every operation of one picture and its box prompts, in order.

    Args:
        sam: a model on the meta device.
        boxes: box prompts.
    """
    found: list[Operation] = []
    handles = [
        module.register_forward_hook(_watch(sam, name, found))
        for name, module in sam.named_modules()
        if type(module) in WORK
    ]
    side, decoder = sam.geometry.encoder_side, sam.mask_decoder
    try:
        with quantizer_mode(sam, Mode.FLOAT):
            features = sam.embed(torch.empty(1, 3, side, side, device="meta"))[0]
            corners = torch.empty(boxes, 4, device="meta")
            sparse, dense = sam.prompt_encoder(boxes=corners)
            positions = sam.prompt_encoder.dense_positions()
            masks, _ = decoder.predict_all(features, positions, sparse, dense)
    finally:
        for handle in handles:
            handle.remove()
    # Fourier features of the grid's cells and of the boxes' corners: two coordinates each.
    coordinates = 2 * (positions[0, 0].numel() + 2 * boxes)
    macs = coordinates * (sam.prompt_encoder.embed_dim // 2)
    found.append(_float_operation(sam, "prompt_encoder.pe_layer", macs, coordinates))
    # Hypernetworks' answers times the upscaled embedding.
    channels = sam.prompt_encoder.embed_dim // 8
    read = boxes * channels * (decoder.num_mask_tokens + masks[0, 0].numel())
    found.append(_float_operation(sam, "mask_decoder.masks", masks.numel() * channels, read))
    return found


def _watch(
    sam: Sam, name: str, found: list[Operation]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """A hook that counts what a module did."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        for work in WORK[type(module)](module, inputs, output):
            found.append(_operation(sam, name, module, work))

    return hook


def _operation(sam: Sam, name: str, module: nn.Module, work: Work) -> Operation:
    operator = as_operator(module)
    slots = {} if operator is None else operator.slots()

    def bits(slot: str) -> int:
        return slots[slot].grid.bits if slot in slots else FLOAT_BITS

    path = f"{name}.{work.name}" if work.name else name
    part = sam.description.part_of(f"{path}@windows" if work.windows else path)
    first, second = work.operands
    read = tuple((elements, bits(slot)) for slot, elements in work.read)
    return Operation(part, path, work.macs, (bits(first), bits(second)), read)


def _float_operation(sam: Sam, name: str, macs: int, read: int) -> Operation:
    part, bits = sam.description.part_of(name), (FLOAT_BITS, FLOAT_BITS)
    return Operation(part, name, macs, bits, ((read, FLOAT_BITS),))
