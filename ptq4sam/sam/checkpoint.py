"""Weights of SAM: official .pth files, those of trainings, safetensors, Hugging Face SamModels."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from ptq4sam.errors import CheckpointError
from ptq4sam.sam.fitting import (
    described,
    fit_state,
    fitting_size,
    read_normalization,
)
from ptq4sam.sam.huggingface import convert_names, is_huggingface, read_directory
from ptq4sam.sam.model import SAM_NORMALIZATION, Sam
from ptq4sam.sam.registry import build_sam, variant_of
from ptq4sam.sam.state_dict import FoundState, find_state
from ptq4sam.sam.weight_file import read_file

_log = logging.getLogger(__name__)

OFFICIAL_FILES = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}
EMBEDDED_FILE = Path(__file__).resolve().parents[1] / "assets" / "vit_nano.safetensors"


def load_sam(
    name: str,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Sam:
    """Load a float SAM, ready for inference, in float32.

    What a training puts around a SAM is taken off, and what it saves beside one is passed over;
    the log says what. Weights that were fine-tuned for pictures of another size, or with another
    normalisation, make a SAM of that size or normalisation.

    Args:
        name: vit_b, vit_l, vit_h or vit_nano.
        checkpoint: a file of torch.save or safetensors, under official or SamModel names, or the
            directory of a Hugging Face SamModel. None: the weights that ship with the package,
            which only vit_nano has.
        device: where the model shall live.

    Raises:
        ConfigError: the name is unknown.
        CheckpointError: the weights are missing, damaged, unsafe to read or another model's.
    """
    found, side, origin = _read(name, checkpoint)
    with torch.device("meta"):
        skeleton = build_sam(name, side)
    state = fit_state(name, found.tensors, skeleton.state_dict(), origin)
    skeleton.load_state_dict(state, assign=True)
    normalization = read_normalization(found.pixel_mean, found.pixel_std, origin)
    notes, own_side = list(found.notes), variant_of(name).image_size
    if side != own_side:
        notes.append(f"this {name} is for pictures of {side} pixels, not {own_side}")
    if notes:
        _log.info("%s: %s", origin, "; ".join(notes))
    if normalization != SAM_NORMALIZATION:
        _log.warning("%s: pictures are normalised by its %s", origin, described(normalization))
    # Made anew outside of the meta device, so that the constants of normalisation are real.
    parts = (skeleton.image_encoder, skeleton.prompt_encoder, skeleton.mask_decoder)
    return Sam(name, *parts, normalization).eval().to(device)


def image_size_of(name: str, checkpoint: str | Path | None = None) -> int:
    """Side in pixels of the input of the SAM that `load_sam` would load; errors as there."""
    return _read(name, checkpoint)[1]


def _read(name: str, checkpoint: str | Path | None) -> tuple[FoundState, int, str]:
    """Tensors under official names, the side of their input, and where they come from."""
    variant_of(name)
    path = _locate(name, checkpoint)
    origin = str(path)
    found = find_state(read_directory(name, path) if path.is_dir() else read_file(path), origin)
    if is_huggingface(found.tensors):
        found = replace(found, tensors=convert_names(found.tensors))
    return found, fitting_size(name, found.tensors, origin), origin


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
