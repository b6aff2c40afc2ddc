"""Weights of SAMs: official .pth files, those of trainings, safetensors, Hugging Face SamModels."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ptq4sam.errors import CheckpointError
from ptq4sam.families import VARIANTS, variant_of
from ptq4sam.families.family import Variant
from ptq4sam.families.fitting import described, fit_state, read_normalization
from ptq4sam.families.foreign import refuse_foreign
from ptq4sam.families.state_dict import FoundState, find_state
from ptq4sam.families.weight_file import read_file
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone

_log = logging.getLogger(__name__)


def load_sam(
    name: str,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    folded: bool = True,
) -> Sam:
    """Load a float SAM, ready for inference, in float32.

    What a training puts around a SAM is taken off, and what it saves beside one is passed over;
    the log says what. Weights that were fine-tuned for pictures of another size, or with another
    normalisation, make a SAM of that size or normalisation.

    Args:
        name: a key of `families.VARIANTS`: vit_b, mobile_sam, ...
        checkpoint: a file of torch.save or safetensors, under official or SamModel names; of a SAM
            with a ViT also the directory of a Hugging Face SamModel. None: the weights that ship
            with the package, which the small ones have.
        device: where the model shall live.
        folded: fold batch normalisations, as for inference; with them is what `compat: study`
            simulates.

    Raises:
        ConfigError: the name is unknown, or it has no batch normalisations to be left.
        CheckpointError: the weights are missing, damaged, unsafe to read or another model's.
    """
    variant = variant_of(name, folded)
    found, side, origin = _read(variant, checkpoint)
    with shapes_alone():
        skeleton = variant.build(side)
    state = fit_state(variant, found.tensors, skeleton.state_dict(), origin)
    skeleton.load_state_dict(state, assign=True)
    own = variant.geometry.normalization
    normalization = read_normalization(found.pixel_mean, found.pixel_std, origin, own)
    notes, own_side = list(found.notes), variant.geometry.encoder_side
    if side != own_side:
        notes.append(f"this {name} is for pictures of {side} pixels, not {own_side}")
    if notes:
        _log.info("%s: %s", origin, "; ".join(notes))
    if normalization != own:
        told = described(normalization, own)
        _log.warning("%s: pictures are normalised by its %s", origin, told)
    # Made anew outside of the meta device, so that the constants of normalisation are real.
    return skeleton.normalized_by(normalization).eval().to(device)


def image_size_of(name: str, checkpoint: str | Path | None = None) -> int:
    """Side in pixels of the input of the SAM that `load_sam` would load; errors as there."""
    return _read(variant_of(name), checkpoint)[1]


def _read(variant: Variant, checkpoint: str | Path | None) -> tuple[FoundState, int, str]:
    """Tensors under official names, the side of their input, and where they come from."""
    path = _locate(variant, checkpoint)
    origin = str(path)
    found = find_state(_content(variant, path), origin, partial(_check_family, variant))
    found = replace(found, tensors=variant.remake(variant.family.fold(found.tensors)))
    return found, variant.side_of(found.tensors, origin), origin


def _check_family(variant: Variant, names: list[str], origin: str) -> None:
    """Refuse a model of another family, by its names.

    Raises:
        CheckpointError: it is one.
    """
    refuse_foreign(names, origin, encoders=False)
    if _is_of(variant, names):
        return
    others = [other.name for other in VARIANTS.values() if _is_of(other, names)]
    if others:
        raise CheckpointError(
            f"{origin}: asked for {variant.name}, but this is a SAM of another family: ask for "
            f"{' or '.join(others)}"
        )
    refuse_foreign(names, origin)


def _is_of(variant: Variant, names: list[str]) -> bool:
    return any(re.search(variant.family.fingerprint, name) for name in names)


def _content(variant: Variant, path: Path) -> object:
    if not path.is_dir():
        return read_file(path)
    if variant.family.read_directory is None:
        raise CheckpointError(
            f"{path}: a directory was given for {variant.name}; {_where_to_get(variant)}"
        )
    return variant.family.read_directory(variant.name, path)


def _locate(variant: Variant, checkpoint: str | Path | None) -> Path:
    if checkpoint is not None:
        path = Path(checkpoint)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory; {_where_to_get(variant)}")
        return path
    embedded = variant.weights.embedded
    if embedded is None:
        raise CheckpointError(
            f"{variant.name} needs a checkpoint, but none was given; {_where_to_get(variant)}"
        )
    if not embedded.is_file():
        raise CheckpointError(
            f"{embedded}: the embedded weights of {variant.name} are missing; install the package "
            "again or give a checkpoint"
        )
    return embedded


def _where_to_get(variant: Variant) -> str:
    weights = variant.weights
    if weights.trained_by is not None:
        return f"no weights of it are published: train them by {weights.trained_by}"
    if weights.download is None:
        return "leave the checkpoint out to use the embedded weights"
    return (
        f"get {weights.file} by ptq4sam download {weights.download}, or from {weights.source}, and "
        "give its path"
    )
