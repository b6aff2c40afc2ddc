"""Weights of SAM: official .pth files, safetensors and Hugging Face SamModel directories."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.sam.huggingface import (
    convert_names,
    is_huggingface,
    read_directory,
    read_safetensors,
)
from ptq4sam.sam.model import Sam
from ptq4sam.sam.registry import VARIANTS, build_sam

OFFICIAL_FILES = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}
EMBEDDED_FILE = Path(__file__).resolve().parents[1] / "assets" / "vit_nano.safetensors"

_WRAPPERS = ("model", "state_dict")
_POSITIONS = "image_encoder.pos_embed"


def load_sam(
    name: str,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Sam:
    """Load a float SAM, ready for inference, in float32.

    Args:
        name: vit_b, vit_l, vit_h or vit_nano.
        checkpoint: an official .pth file, a safetensors file under official or SamModel names, or
            the directory of a Hugging Face SamModel. None: the weights that ship with the package,
            which only vit_nano has.
        device: where the model shall live.

    Raises:
        ConfigError: the name is unknown.
        CheckpointError: the weights are missing, damaged, unsafe to read or another model's.
    """
    with torch.device("meta"):
        skeleton = build_sam(name)
    path = _locate(name, checkpoint)
    state = fit_state(name, read_state(name, path), skeleton.state_dict(), str(path))
    skeleton.load_state_dict(state, assign=True)
    # Made anew outside of the meta device, so that the constants of normalisation are real.
    sam = Sam(name, skeleton.image_encoder, skeleton.prompt_encoder, skeleton.mask_decoder)
    return sam.eval().to(device)


def read_state(name: str, path: Path) -> dict[str, Tensor]:
    """Read tensors under official names from any supported file or directory, as they are there.

    Args:
        name: the variant that was asked for.
        path: see `load_sam`.

    Raises:
        CheckpointError: the weights are missing, damaged or unsafe to read.
    """
    if path.is_dir():
        return read_directory(name, path)
    state = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return convert_names(state) if is_huggingface(state) else state


def fit_state(
    name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Check tensors against the model that was asked for and copy them to float32.

    Args:
        name: the variant that was asked for, for messages.
        state: tensors under official names.
        expected: the model's own tensors (of any device, meta too); only shapes matter.
        origin: where the tensors come from, for messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, not of floats, or holds
            values that are not finite.
    """
    _check_variant(name, state, expected, origin)
    _check_names(name, state, expected, origin)
    fitted = {}
    for key, reference in expected.items():
        tensor = state[key]
        if tensor.shape != reference.shape:
            raise CheckpointError(
                f"{origin}: {name} needs {key} of shape {tuple(reference.shape)}, but found "
                f"{tuple(tensor.shape)}; give the weights of an unchanged {name}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{origin}: {name} needs {key} in floating point, but found {tensor.dtype}; "
                "give the float weights"
            )
        # A copy, since the file is mapped into memory and may be replaced while the model lives.
        fitted[key] = tensor.detach().to(torch.float32, copy=True).contiguous()
        if not fitted[key].isfinite().all():
            raise CheckpointError(
                f"{origin}: {key} holds values that are not finite; "
                "the file is damaged or its training diverged: give another"
            )
    return fitted


def _locate(name: str, checkpoint: str | Path | None) -> Path:
    if checkpoint is not None:
        path = Path(checkpoint)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory; {_where_to_get(name)}")
        return path
    if name in OFFICIAL_FILES:
        raise CheckpointError(
            f"{name} needs a checkpoint, but none was given; {_where_to_get(name)}"
        )
    if not EMBEDDED_FILE.is_file():
        raise CheckpointError(
            f"{EMBEDDED_FILE}: the embedded weights of {name} are missing; install the package "
            "again or give a checkpoint"
        )
    return EMBEDDED_FILE


def _where_to_get(name: str) -> str:
    if name not in OFFICIAL_FILES:
        return "leave the checkpoint out to use the embedded weights"
    return (
        f"get {OFFICIAL_FILES[name]} by ptq4sam download sam-{name.replace('_', '-')}, or from "
        "github.com/facebookresearch/segment-anything, and give its path"
    )


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Only zip archives can be mapped; torch.load reads the older format whole.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path}: holds more than tensors, and reading it could run code; "
                "give a file with the state dict alone"
            ) from error
        raise _damaged(path, error) from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        struct.error,
    ) as error:
        # A damaged pickle stream fails in as many ways as it has operations.
        raise _damaged(path, error) from error
    return _unwrap(path, content)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
    return CheckpointError(
        f"{path}: damaged or not a PyTorch checkpoint ({reason[:100]}); download it "
        "again, or give the file of a SAM's weights"
    )


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path}: holds no named tensors, but {type(content).__name__}; give a state dict"
        )
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: {others[0]!r} is not a tensor; give a file with the state dict alone"
        )
    return {str(key): value for key, value in content.items()}


def _check_variant(
    name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> None:
    if _POSITIONS not in state or _POSITIONS not in expected:
        return
    width, wanted = state[_POSITIONS].shape[-1], expected[_POSITIONS].shape[-1]
    if width == wanted:
        return
    others = [other for other, variant in VARIANTS.items() if variant.embed_dim == width]
    hint = f"that of {others[0]}: ask for that" if others else "that of no SAM known here"
    raise CheckpointError(
        f"{origin}: asked for {name} of width {wanted}, but the file's width is {width}, {hint}"
    )


def _check_names(
    name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> None:
    problems = []
    for kind, keys in (
        ("misses", sorted(expected.keys() - state.keys())),
        ("does not know", sorted(state.keys() - expected.keys())),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            problems.append(f"{kind} {keys[0]}{more}")
    if problems:
        raise CheckpointError(
            f"{origin}: {name} {' and '.join(problems)}; give the weights of an unchanged {name}"
        )
