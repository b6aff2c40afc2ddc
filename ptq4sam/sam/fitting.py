"""Tensors of a checkpoint against the SAM that was asked for: its size, names, shapes, values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.sam.image_encoder import table_of_size
from ptq4sam.sam.model import SAM_NORMALIZATION, Normalization
from ptq4sam.sam.registry import VARIANTS, SamVariant

_POSITIONS = "image_encoder.pos_embed"
_RELATIVE = ("rel_pos_h", "rel_pos_w")
_NAMED_AT_ONCE = 3

# Of a mean or a deviation: half precision keeps three digits, bfloat16 hardly.
_SAME = 4e-3
_LEVELS = 255


def fitting_size(name: str, state: Mapping[str, Tensor], origin: str) -> int:
    """Side in pixels of the input that tensors were trained for.

    Args:
        name: the variant that was asked for.
        state: tensors under official names.
        origin: where the tensors come from, for messages.

    Raises:
        CheckpointError: the position embedding is another variant's, or no square.
    """
    variant, positions = VARIANTS[name], state.get(_POSITIONS)
    if positions is None:
        return variant.image_size
    wanted = variant.embed_dim
    width = positions.shape[-1] if positions.dim() else wanted
    if width != wanted:
        others = [other for other, known in VARIANTS.items() if known.embed_dim == width]
        looks = (
            f"looks like {others[0]}: ask for that" if others else "is that of no SAM known here"
        )
        raise CheckpointError(
            f"{origin}: asked for {name} of width {wanted}, but the file's width of {width} {looks}"
        )
    if positions.dim() != 4 or positions.shape[1] != positions.shape[2]:
        raise CheckpointError(
            f"{origin}: {name} needs {_POSITIONS} of shape (1, n, n, {wanted}), but found "
            f"{tuple(positions.shape)}; give weights for square pictures"
        )
    return positions.shape[1] * variant.patch_size


def fit_state(
    name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Check tensors against the model that was asked for and copy them to float32.

    Args:
        name: the variant that was asked for.
        state: tensors under official names.
        expected: the model's own tensors (of any device, meta too); only shapes matter.
        origin: where the tensors come from, for messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, not of floats, or holds
            values that are not finite.
    """
    _check_names(name, state, expected, origin)
    fitted = {}
    for key, reference in expected.items():
        tensor = state[key]
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{origin}: {name} needs {key} in floating point, but found {tensor.dtype}; "
                "give the float weights"
            )
        # A copy, since the file is mapped into memory and may be replaced while the model lives.
        copied = tensor.detach().to(torch.float32, copy=True).contiguous()
        if _is_table_of(VARIANTS[name], key, copied):
            copied = table_of_size(copied, (len(reference) + 1) // 2).contiguous()
        if copied.shape != reference.shape:
            raise CheckpointError(
                f"{origin}: {name} needs {key} of shape {tuple(reference.shape)}, but found "
                f"{tuple(tensor.shape)}; give the weights of an unchanged {name}"
            )
        if not copied.isfinite().all():
            raise CheckpointError(
                f"{origin}: {key} holds values that are not finite; "
                "the file is damaged or its training diverged: give another"
            )
        fitted[key] = copied
    return fitted


def read_normalization(mean: Tensor | None, std: Tensor | None, origin: str) -> Normalization:
    """What a checkpoint says that pictures are normalised by; SAM's own where it says nothing.

    Args:
        mean: three values by channel, of pictures of 0 to 255 or of 0 to 1.
        std: the same.
        origin: where they come from, for messages.

    Raises:
        CheckpointError: they are no three usable values, or could be of either range.
    """
    if mean is not None and std is not None and not mean.any() and (std == 1).all():
        raise CheckpointError(
            f"{origin}: its pixel_mean is 0 and its pixel_std 1: pictures were normalised outside "
            "of the model, and the file does not say how; write into it by what, for values of 0 "
            "to 255"
        )
    found = Normalization(
        SAM_NORMALIZATION.mean if mean is None else _of_levels(mean),
        SAM_NORMALIZATION.std if std is None else _of_levels(std),
    )
    usable = len(found.mean) == len(found.std) == 3
    if not usable or not all(map(math.isfinite, found.mean + found.std)) or min(found.std) <= 0:
        raise CheckpointError(
            f"{origin}: no picture of three channels can be normalised by its {described(found)}; "
            "write three finite values of each into it, or none for SAM's own"
        )
    ours = [*SAM_NORMALIZATION.mean, *SAM_NORMALIZATION.std]
    pairs = zip(ours, [*found.mean, *found.std], strict=True)
    same = all(math.isclose(one, other, rel_tol=_SAME) for one, other in pairs)
    return SAM_NORMALIZATION if same else found


def _of_levels(values: Tensor) -> tuple[float, ...]:
    """Means or deviations for values of 0 to 255, which those of 0 to 1 have below 1."""
    given = values.flatten().tolist()
    scale = _LEVELS if all(abs(value) <= 1 for value in given) else 1
    return tuple(scale * value for value in given)


def described(found: Normalization) -> str:
    """A normalisation beside SAM's own, for a message."""
    return (
        f"mean {_listed(found.mean)} and deviation {_listed(found.std)}, where SAM has "
        f"{_listed(SAM_NORMALIZATION.mean)} and {_listed(SAM_NORMALIZATION.std)}"
    )


def _listed(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


def _is_table_of(variant: SamVariant, key: str, tensor: Tensor) -> bool:
    """Whether a tensor holds relative positions of a whole picture of the variant's own size.

    A model that was fine-tuned for another size may have kept them: it interpolates them in each
    pass, which comes to the same as once.
    """
    words = key.split(".")
    grid = variant.image_size // variant.patch_size
    return (
        words[-1] in _RELATIVE
        and tensor.dim() == 2
        and int(words[2]) in variant.global_attn_indexes
        and len(tensor) == 2 * grid - 1
    )


def _check_names(
    name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> None:
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    problems = []
    if missing:
        problems.append(f"misses {_first(missing)}")
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing or expected, n=1)
        hint = f" (the nearest is {near[0]})" if near else ""
        problems.append(f"does not know {_first(unknown)}{hint}")
    if problems:
        raise CheckpointError(
            f"{origin}: {name} {' and '.join(problems)}; give the weights of an unchanged {name}"
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_ONCE} more" if len(names) > _NAMED_AT_ONCE else ""
    return ", ".join(names[:_NAMED_AT_ONCE]) + more
