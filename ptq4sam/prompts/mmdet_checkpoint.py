"""Checkpoints of mmdetection 2 and 3: read without running what is in them, loaded strictly."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from ptq4sam.data.images import reason
from ptq4sam.errors import CheckpointError
from ptq4sam.pickles import UNREADABLE, load_pickle, refused_name, short_reason

_DINO_2 = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^bbox_head\.transformer\.", ""),
        (r"^bbox_head\.label_embedding\.", "dn_query_generator.label_embedding."),
        (r"^level_embeds$", "level_embed"),
        (r"^query_embed\.", "query_embedding."),
        (r"^enc_output\.", "memory_trans_fc."),
        (r"^enc_output_norm\.", "memory_trans_norm."),
        # A sequence of linear layers and activations has become a list of the linear ones.
        (r"^decoder\.ref_point_head\.0\.", "decoder.ref_point_head.layers.0."),
        (r"^decoder\.ref_point_head\.2\.", "decoder.ref_point_head.layers.1."),
        (r"^((?:en|de)coder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
        (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
        (r"^((?:en|de)coder\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
    )
)
"""How mmdetection 3 renamed the parameters of DINO, in the order of application."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The parameters in a checkpoint of mmdetection, under the names of mmdetection 3.

    Copies that a moving average keeps beside the parameters (`ema_...`) are left out: what is
    averaged is saved as the parameters themselves.

    Args:
        path: a file of mmdetection 2 (weights) or 3 (weights and training history), or a bare
            state dict.

    Raises:
        CheckpointError: the file is missing, damaged, names anything but weights and training
            history, or has no weights.
    """
    try:
        content = load_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged, or names more than weights and mmengine's training "
            f"history ({refused_name(error) or short_reason(error)}); get the publisher's file"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} has no state_dict: give a checkpoint of mmdetection")
    tensors = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not key.startswith("ema_")
    }
    if not tensors:
        raise CheckpointError(f"{path} has no weights: give a checkpoint of mmdetection")
    return current_names(tensors)


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters under mmdetection 3's names; YOLOX and Faster R-CNN have kept theirs.

    DINO was written for mmdetection 2 with the transformer inside the head; its names there are
    those of mmcv's transformer layers.
    """
    if not any(key.startswith("bbox_head.transformer.") for key in state):
        return dict(state)
    return {_current_name(key): value for key, value in state.items()}


def _current_name(key: str) -> str:
    for pattern, replacement in _DINO_2:
        key = pattern.sub(replacement, key)
    return key


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Put a checkpoint's parameters into a model: all of them, and no others.

    Args:
        model: of mmdetection 3.
        path: the checkpoint.
        name: of the model, for messages.

    Raises:
        CheckpointError: the file cannot be read, or its parameters are not the model's.
    """
    state = read_state(path)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        # torch's message has a line for each tensor, below a headline.
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"{path} does not fit {name}: {' '.join(first[0].split())}; give the checkpoint of "
            "this configuration"
        ) from error
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit {name}: missing {_some(missing)}, not known {_some(unexpected)}; "
            "give the checkpoint of this configuration"
        )


def _some(keys: Collection[str]) -> str:
    if not keys:
        return "nothing"
    return f"{len(keys)} parameters ({', '.join(sorted(keys)[:3])}{', ...' * (len(keys) > 3)})"
