"""YOLOX's published .pth files: which size they hold, and their weights in a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.pickles import UNREADABLE, load_pickle, refused_name, short_reason
from ptq4sam.prompts.yolox_network import SIZES, STRIDES, YoloxNetwork, YoloxSize
from ptq4sam.skeletons import shapes_alone

_STEM = "backbone.backbone.stem.conv.conv.weight"
_DEPTHWISE = "backbone.backbone.dark2.0.dconv.conv.weight"
_CLASSES = "head.cls_preds.0.bias"
_BOTTLENECK = re.compile(r"backbone\.backbone\.dark2\.1\.m\.(\d+)\.conv1\.conv\.weight")


def load_yolox(path: Path, side: int | None = None) -> YoloxNetwork:
    """Read a .pth file of YOLOX's authors, or of a training with their code.

    The size and the number of classes are those of the tensors. Nothing but tensors and plain
    values is unpickled.

    Args:
        path: a state dict, or a checkpoint that has it under "model".
        side: height and width in pixels of the input, a multiple of 32; None for what the size was
            trained for (nano and tiny 416, else 640).

    Raises:
        CheckpointError: the file is missing, damaged or unsafe to read, or a tensor is missing,
            unexpected, of another shape or not finite.
        ConfigError: the side is not possible.
    """
    state = _read(path)
    size = _identify(state, path)
    if side is not None:
        if side < STRIDES[-1] or side % STRIDES[-1]:
            raise ConfigError(
                f"YOLOX was asked to see {side} pixels: give a multiple of {STRIDES[-1]}"
            )
        size = replace(size, side=side)
    with shapes_alone():
        network = YoloxNetwork(size, len(state[_CLASSES]))
    _check(state, network.state_dict(), path)
    state = {
        # Running on half precision, as some files are stored, is not possible on every device.
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = load_pickle(path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no YOLOX file {path}") from None
    except UNREADABLE as error:
        name = refused_name(error)
        if name is not None:
            raise CheckpointError(
                f"{path} holds more than tensors (a {name}), and reading that could run code: "
                'save what it has under "model" as a file of its own'
            ) from error
        raise CheckpointError(
            f"{path} is damaged or no PyTorch file ({short_reason(error)}): get it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f'{path} holds no state dict, alone or under "model": give YOLOX\'s .pth file'
        )
    return {str(key): tensor for key, tensor in content.items()}


def _identify(state: Mapping[str, Tensor], path: Path) -> YoloxSize:
    bottlenecks = sum(1 for key in state if _BOTTLENECK.fullmatch(key))
    if _STEM not in state or _CLASSES not in state or not bottlenecks:
        raise CheckpointError(
            f"{path} is no YOLOX under its authors' names (as {_STEM}): "
            "give a file of their releases; mmdetection's need mmdet"
        )
    found = (len(state[_STEM]), bottlenecks, _DEPTHWISE in state)
    for size in SIZES.values():
        if found == (size.width, size.depth, size.depthwise):
            return size
    raise CheckpointError(
        f"{path} has a YOLOX of width {found[0]} and depth {found[1]}, which is none of "
        f"{', '.join(SIZES)}: give one of these sizes"
    )


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    for problem, keys in (
        ("misses", expected.keys() - state.keys()),
        ("has what a YOLOX has not,", state.keys() - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{path} {problem} {min(keys)}{more}: give an unchanged YOLOX")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{path} has {key} of shape {list(tensor.shape)}, "
                f"{list(expected[key].shape)} is needed: give an unchanged YOLOX"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {key} holds values that are not finite: get the file again"
            )
