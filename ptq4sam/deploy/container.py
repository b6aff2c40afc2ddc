"""The file of a quantized model: tensors and a description, with checksums, as safetensors.

The metadata of the file has two entries: "ptq4sam", the description as JSON, and "sha256", the
checksum of that text. The description holds the checksum of every tensor, so that the two of them
together cover the whole content, and damage is reported with the name of what it hit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.files import replacing

DESCRIPTION = "ptq4sam"
CHECKSUM = "sha256"
"""Entries of the metadata."""
UNPACKED_VERSION = 1
"""Format of ptq4sam 0.1 before packing: float32 weights, no checksums; still read."""
FORMAT_VERSION = 2
"""Format that is written."""

_CHECKSUMS = "checksums"
_AGAIN = "copy it again or quantize again"


def write_container(path: Path, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and their description, atomically.

    Args:
        path: the file; missing folders are made.
        tensors: by name.
        description: what JSON can hold; format version and checksums are added.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _digest(tensor) for name, tensor in contents.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, **description, _CHECKSUMS: checksums})
    metadata = {DESCRIPTION: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}
    with replacing(path) as temporary:
        save_file(contents, temporary, metadata=metadata)


def is_quantized_file(path: str | Path) -> bool:
    """Whether a file is one that `save` wrote.

    Raises:
        CheckpointError: it is a safetensors file, but damaged.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return DESCRIPTION in _metadata(path)


def read_description(path: Path) -> dict[str, Any]:
    """The description of a file, checked.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not of this format.
    """
    if not path.is_file():
        raise CheckpointError(f"asked to load {path}, which does not exist: check the path")
    metadata = _metadata(path)
    if DESCRIPTION not in metadata:
        raise CheckpointError(
            f"{path} is not a quantized model of ptq4sam: load float weights with --model and "
            "--checkpoint, or write one with ptq4sam quantize"
        )
    text = metadata[DESCRIPTION]
    try:
        description = json.loads(text)
        version = int(description["format_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged (its description): {_AGAIN}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this ptq4sam reads up to {FORMAT_VERSION}: "
            "install the version that wrote it or quantize again"
        )
    if version != UNPACKED_VERSION:
        found = hashlib.sha256(text.encode()).hexdigest()
        if version < UNPACKED_VERSION or found != metadata.get(CHECKSUM):
            raise CheckpointError(
                f"{path} is damaged (its description does not have its checksum): {_AGAIN}"
            )
    checked: dict[str, Any] = description
    return checked


def read_container(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file, each compared with its checksum.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not of this format.
    """
    description = read_description(path)
    return dict(checked_tensors(path, description)), description


def checked_tensors(path: Path, description: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file by name, one after the other, each compared with its checksum.

    Args:
        path: the file.
        description: what `read_description` found in it.

    Raises:
        CheckpointError: the file is damaged; the tensor that was hit is named.
    """
    checksums = description.get(_CHECKSUMS, {})
    unchecked = description["format_version"] == UNPACKED_VERSION
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not unchecked and checksums.keys() != names:
                name = min(checksums.keys() ^ names)
                raise CheckpointError(
                    f"{path} is damaged ({name} is missing or too much): {_AGAIN}"
                )
            for name in sorted(names):
                tensor = file.get_tensor(name)
                if not unchecked and _digest(tensor) != checksums[name]:
                    raise CheckpointError(
                        f"{path} is damaged ({name} does not have its checksum): {_AGAIN}"
                    )
                yield name, tensor
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _digest(tensor: Tensor) -> str:
    """SHA-256 over type, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path} is damaged ({reason}): {_AGAIN}")
