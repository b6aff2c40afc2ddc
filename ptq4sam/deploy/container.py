"""The file of a quantized model: tensors and a description, with checksums, as safetensors.

The metadata of the file has one entry, "ptq4sam": the description as JSON, whose first member,
"sha256", is the checksum of the text of all others. The description holds the checksum of every
tensor, so that the two of them together cover the whole content, and damage is reported with the
name of what it hit. More than one entry would stand in an order that differs from file to file.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam.contents import is_safetensors, otherwise
from ptq4sam.errors import CheckpointError
from ptq4sam.files import replacing

DESCRIPTION = "ptq4sam"
"""The entry of the metadata."""
CHECKSUM = "sha256"
"""Its first member; an entry of its own up to format version 2."""
UNPACKED_VERSION = 1
"""Format of ptq4sam 0.1 before packing: float32 weights, no checksums; still read."""
_SIGNED_WITHIN = 3
"""From this format on a description holds its own checksum."""
WITH_CORES = 4
"""From this format on quantizers of attentions are named below the attention's `core`."""
FORMAT_VERSION = 4
"""Format that is written; earlier ones are read too."""

_CHECKSUMS = "checksums"
_AGAIN = "copy it again or quantize again"
_QUANTIZED = "load float weights by the name of their model, or write one with ptq4sam quantize"


def write_container(path: Path, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and their description, atomically.

    Args:
        path: the file; missing folders are made.
        tensors: by name.
        description: what JSON can hold; format version and checksums are added.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _digest(tensor) for name, tensor in contents.items()}
    text = signed({"format_version": FORMAT_VERSION, **description, _CHECKSUMS: checksums})
    with replacing(path) as temporary:
        save_file(contents, temporary, metadata={DESCRIPTION: text})


def signed(description: Mapping[str, Any]) -> str:
    """A description as JSON, with its checksum as the first member."""
    text = json.dumps(description)
    return _opening(_text_digest(text)) + text[1:]


def _opening(checksum: str) -> str:
    return f'{{"{CHECKSUM}": "{checksum}", '


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_intact(text: str, version: int, metadata: Mapping[str, str]) -> bool:
    """Whether a description has its checksum."""
    if version < _SIGNED_WITHIN:
        return _text_digest(text) == metadata.get(CHECKSUM)
    length = len(_opening(64 * "0"))
    opening, rest = text[:length], "{" + text[length:]
    return opening == _opening(_text_digest(rest))


def is_quantized_file(path: str | Path) -> bool:
    """Whether a file is one that `save` wrote, whatever its name.

    Raises:
        CheckpointError: it is a safetensors file, but damaged.
    """
    path = Path(path)
    if not path.is_file() or not is_safetensors(path):
        return False
    return DESCRIPTION in _metadata(path)


def read_description(path: Path) -> dict[str, Any]:
    """The description of a file, checked.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not of this format.
    """
    if path.is_dir():
        raise CheckpointError(
            f"asked to load {path}, which is a folder: name the file that ptq4sam quantize wrote"
        )
    if not path.is_file():
        raise CheckpointError(f"asked to load {path}, which does not exist: check the path")
    metadata = _metadata(path)
    if DESCRIPTION not in metadata:
        raise CheckpointError(f"{path} is not a quantized model of ptq4sam: {_QUANTIZED}")
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
    known = version >= UNPACKED_VERSION
    if version != UNPACKED_VERSION and not (known and _is_intact(text, version, metadata)):
        raise CheckpointError(
            f"{path} is damaged (its description does not have its checksum): {_AGAIN}"
        )
    description.pop(CHECKSUM, None)
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
    instead = otherwise(path) if path.stat().st_size else None
    if instead is None and zipfile.is_zipfile(path):
        instead = f"is a PyTorch checkpoint: {_QUANTIZED}"
    if instead is not None:
        return CheckpointError(f"{path} is not a quantized model of ptq4sam, it {instead}")
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path} is damaged ({reason}): {_AGAIN}")
