"""Files of weights: what they hold, in whichever of two formats, or what they are instead."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ptq4sam.contents import is_pickle, is_safetensors, otherwise
from ptq4sam.errors import CheckpointError
from ptq4sam.pickles import UNREADABLE, load_pickle, refused_name, short_reason

SAVE_AGAIN = "torch.save(model.state_dict(), 'weights.pth')"
"""How a file is written that holds nothing but weights."""
_RELEASED_MODULE = "tinysam_w8a8.pth"
"""TinySAM's quantized model, which was published as a pickled module."""


def read_file(path: Path) -> object:
    """The content of a file: of safetensors the tensors by name, of torch.save what was saved.

    Bytes decide the format, not the file's name. Nothing that a file names is run.

    Raises:
        CheckpointError: the file is damaged, something else than weights, or unsafe to read.
    """
    instead = otherwise(path)
    if instead is not None:
        raise CheckpointError(f"{path} {instead}")
    if is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: a damaged safetensors file ({short_reason(error)}); download it again"
            ) from error
    try:
        return load_pickle(path)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: {_problem(path, error)}") from error


def _problem(path: Path, error: Exception) -> str:
    name = refused_name(error)
    if name is not None and (path.name == _RELEASED_MODULE or name.startswith("tinysam.")):
        return (
            f"is a pickled module of TinySAM (a {name}), no weights, and reading that could run "
            "code; use its float weights instead (ptq4sam download tinysam), which exp/tinysam/ "
            "quantizes in the same way"
        )
    if name is not None:
        return (
            f"holds more than tensors (a {name}), and reading that could run code; save the "
            f"weights alone where the file was written: {SAVE_AGAIN}"
        )
    if "Unsupported operand" in str(error) and is_pickle(path):
        return (
            "was written by pickle, or with another pickle protocol than torch.save's own; save "
            f"it again: {SAVE_AGAIN}"
        )
    return (
        "damaged, or neither a PyTorch checkpoint nor safetensors "
        f"({short_reason(error)}); download it again, or give the file of a SAM's weights"
    )
