"""What stays float in a quantized model, in half precision where a scheme says so."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4sam.operators.base import quantized_layers
from ptq4sam.sam.model import Sam


@torch.no_grad()
def round_float_weights(sam: Sam) -> None:
    """Round weights and tables that no quantizer touches to float16; they stay float32 tensors.

    These are the position embedding (two thirds of them in ViT-B), the patch embedding, the
    relative positions, the upscaling, the hypernetworks and the IoU head. Biases, layer norms and
    the prompt encoder stay as they are: they are small. A tensor beyond float16's range stays too.
    """
    for tensor in float_weights(sam).values():
        rounded = tensor.half().to(tensor.dtype)
        # Chosen where the tensor is: nobody waits for an answer, and there may be no values at all.
        tensor.copy_(torch.where(rounded.isfinite().all(), rounded, tensor))


def float_weights(sam: Sam) -> dict[str, Tensor]:
    """The tensors that `round_float_weights` rounds, by name."""
    quantized = {f"{name}.weight" for name, _ in quantized_layers(sam)}
    return {
        name: parameter
        for name, parameter in sam.named_parameters()
        if name.startswith(("image_encoder.", "mask_decoder."))
        and parameter.dim() > 1
        and name not in quantized
    }
