"""What an error of a layer does to masks: squared gradients of the task's loss by its output.

The loss is the KL divergence of the masks (pixel by pixel, its mean over a mask) and of the
predicted IoUs (as probabilities) that a model gives, from those of the float model. At the float
model itself it is least, so that its gradient says nothing; what an error costs is its second
derivative. That is Fisher's information: the expectation of the squared gradient of the likelihood
when answers are drawn from what the float model predicts. So answers are drawn, once for each
picture, and one backward pass has the squared gradients by the outputs of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ptq4sam.operators.arithmetic import learning
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode

_SURE = 0.01
"""Predicted IoUs are taken as no nearer to 0 and 1."""

Keep = Callable[[str, Tensor], Tensor]
"""What is kept of a tensor that belongs to the output of a module by its name."""


def drawn_loss(logits: Tensor, ious: Tensor, generator: torch.Generator) -> Tensor:
    """A number whose squared gradients are, in expectation, second derivatives of the task's loss.

    Args:
        logits: of masks [prompts, masks, height, width].
        ious: predicted IoUs [prompts, masks].
        generator: of the answers, on the CPU.
    """
    likely = logits.detach().sigmoid()
    answers = torch.bernoulli(likely.cpu(), generator=generator).to(likely)
    # Divided by the root of the pixels: squared, that is the mean over a mask.
    masks = ((likely - answers) * logits).sum() / math.sqrt(logits.shape[-2] * logits.shape[-1])
    likely = ious.detach().clamp(_SURE, 1 - _SURE)
    answers = torch.bernoulli(likely.cpu(), generator=generator).to(likely)
    return masks + ((likely - answers) / (likely * (1 - likely)) * ious).sum()


def squared_gradients(
    sam: Any,
    pixels: Tensor,
    boxes: Tensor,
    modules: Mapping[str, nn.Module],
    seed: int,
    keep: Keep = lambda _name, x: x,
) -> dict[str, Tensor]:
    """Squared gradients by what modules give for one picture, without quantization.

    Args:
        sam: the model, with quantizers or not.
        pixels: the picture [1, 3, side, side], normalised and padded.
        boxes: [n, 4] xyxy in pixels of the prompts' square.
        modules: below it, by name.
        seed: of the drawn answers.
        keep: the part of each that is kept.

    Returns:
        By name, as `keep` gives them; none for modules that no mask depends on.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()

        def take(gradient: Tensor) -> None:
            found[name] = keep(name, gradient.square())

        output.register_hook(take)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(
                lambda _module, _inputs, output, name=name: watch(name, output)
            )
            stack.callback(hook.remove)
        stack.enter_context(learning(sam))
        stack.enter_context(quantizer_mode(sam, Mode.FLOAT))
        stack.enter_context(torch.enable_grad())  # type: ignore[no-untyped-call]
        given = pixels.to(sam.device).clone().requires_grad_()
        logits, ious = sam.decode(sam.embed(given), None, boxes.to(sam.device), None, True)
        loss = drawn_loss(logits, ious, torch.Generator("cpu").manual_seed(seed))
        loss.backward()  # type: ignore[no-untyped-call]
    return found
