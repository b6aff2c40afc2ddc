"""What a device has free, and what a model at work needs of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4sam.machine import available_memory
from ptq4sam.operators.base import SOFTMAX, WORK
from ptq4sam.sam.model import Sam

_MATRICES_PER_ATTENTION = 3.5
"""Matrices of an attention's size that a reconstruction step holds at once: three in its
backward pass, and the rest of the step."""


def free_memory(device: torch.device) -> int:
    """Free bytes of a device's memory, of the host's for the CPU.

    What torch's allocator holds back and nobody uses is free too: the driver does not know that.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type == "xpu":
        held = torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
        return int(torch.xpu.mem_get_info(device)[0]) + held
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return available_memory()


@torch.no_grad()
def working_bytes(sam: Sam) -> int:
    """Bytes that quantizing a model takes beside the activations that are kept.

    A copy of the weights for the quantized model, and the largest step: that of an attention.

    Args:
        sam: the float model; on the meta device nothing is computed.
    """
    weights = sum(tensor.numel() * tensor.itemsize for tensor in sam.state_dict().values())
    elements = [0]

    def look(operator: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for work in WORK[type(operator)](operator, inputs, output):
            elements.append(dict(work.read).get(SOFTMAX, 0))

    operators = [module for module in sam.image_encoder.modules() if type(module) in WORK]
    handles = [operator.register_forward_hook(look) for operator in operators]
    try:
        side = sam.geometry.encoder_side
        sam.embed(torch.zeros(1, 3, side, side, device=sam.device))
    finally:
        for handle in handles:
            handle.remove()
    return int(weights + _MATRICES_PER_ATTENTION * max(elements) * 4)
