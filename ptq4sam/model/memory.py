"""What a device has free, and what a model at work needs of it."""

from __future__ import annotations

import math
from typing import cast

import torch

from ptq4sam.families.sam_vit.image_encoder import Attention
from ptq4sam.machine import available_memory
from ptq4sam.sam.model import Sam

_MATRICES_PER_ATTENTION = 3.5
"""Matrices of a global attention's size that a reconstruction step holds at once: three in its
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


def working_bytes(sam: Sam) -> int:
    """Bytes that quantizing a model takes beside the activations that are kept.

    A copy of the weights for the quantized model, and the largest step: that of a global attention.

    Args:
        sam: the float model.
    """
    weights = sum(tensor.numel() * tensor.itemsize for tensor in sam.state_dict().values())
    tokens = math.prod(sam.prompt_encoder.image_embedding_size)
    attentions = [b.attn for b in sam.image_encoder.blocks if b.window_size == 0]
    heads = max((cast(Attention, attention).num_heads for attention in attentions), default=0)
    return int(weights + _MATRICES_PER_ATTENTION * heads * tokens**2 * 4)
