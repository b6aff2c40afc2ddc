"""Weights of the detectors' authors, read without running anything of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq4sam.contents import is_safetensors
from ptq4sam.data.images import reason
from ptq4sam.errors import CheckpointError
from ptq4sam.pickles import UNREADABLE, load_pickle


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint of the authors' training, or of a plain state dict.

    Such a checkpoint also holds the optimizer's state and the training's arguments, which are
    passed over.

    Args:
        path: .pth or .safetensors.

    Raises:
        CheckpointError: the file is damaged, holds other objects, or no tensors by name.
    """
    try:
        if path.is_file() and is_safetensors(path):
            return load_file(path)
        content: Any = load_pickle(path)
    except (*UNREADABLE, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {reason(error)}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds no weights: tensors by name are needed, or such under 'model'"
        )
    return dict(state)


def rename(
    state: Mapping[str, Tensor],
    rules: Sequence[tuple[str, str]],
    unused: Sequence[str],
    origin: str,
) -> dict[str, Tensor]:
    """One tensor for each parameter, where the authors' modules are held in several places.

    Args:
        state: tensors under the authors' names.
        rules: patterns of names, and what takes their place.
        unused: names of tensors that training alone has a use for.
        origin: the file, for messages.

    Raises:
        CheckpointError: two tensors that should be one differ.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in unused:
            continue
        short = name
        for pattern, replacement in rules:
            short = re.sub(pattern, replacement, short)
        if short in renamed and not torch.equal(renamed[short], tensor):
            raise CheckpointError(
                f"{origin}: {name} differs from its copy {short}: "
                "heads that are shared are needed, give the published weights"
            )
        renamed[short] = tensor
    return renamed


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Give a model (of any device, meta too) exactly these tensors, in float32.

    Raises:
        CheckpointError: a tensor is missing, not known, of another shape or not of floats.
    """
    expected = model.state_dict()
    absent = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    wrong = ((absent, "missing"), (unknown, "not known"))
    parts = [f"{_first(names)} {what}" for names, what in wrong if names]
    if parts:
        raise CheckpointError(
            f"{origin} is not of this detector, {' and '.join(parts)}: give the published weights"
        )
    for name, tensor in state.items():
        wanted = expected[name].shape
        if tensor.shape != wanted or not tensor.is_floating_point():
            raise CheckpointError(
                f"{origin}: {name} of shape {list(wanted)} in floating point is needed, "
                f"{list(tensor.shape)} in {tensor.dtype} was found: give the published weights"
            )
    # Copies, since a file that is mapped may be replaced while the model lives.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    model.load_state_dict(copies, assign=True)


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
