"""Tensors of a checkpoint against the SAM that was asked for: its names, shapes, values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families.family import Variant
from ptq4sam.sam.geometry import Normalization

_NAMED_AT_ONCE = 3

# Of a mean or a deviation: half precision keeps three digits, bfloat16 hardly.
_SAME = 4e-3
_LEVELS = 255


def fit_state(
    variant: Variant, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Check tensors against the model that was asked for and copy them to float32, or counts.

    Args:
        variant: that was asked for.
        state: tensors under official names.
        expected: the model's own tensors (of any device, meta too); only shapes matter.
        origin: where the tensors come from, for messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, not of floats, or holds
            values that are not finite.
    """
    name = variant.name
    _check_names(name, state, expected, origin)
    fitted = {}
    for key, reference in expected.items():
        tensor = state[key]
        counts = not reference.is_floating_point()
        if not counts and not tensor.is_floating_point():
            raise CheckpointError(
                f"{origin}: {name} needs {key} in floating point, but found {tensor.dtype}; "
                "give the float weights"
            )
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind_of = "has no values (a meta tensor)" if tensor.is_meta else f"is {tensor.layout}"
            raise CheckpointError(
                f"{origin}: {key} {kind_of}; save plain tensors, as model.state_dict() has them"
            )
        # A copy, since the file is mapped into memory and may be replaced while the model lives.
        kind = reference.dtype if counts else torch.float32
        copied = tensor.detach().to(kind, copy=True).contiguous()
        copied = variant.fit(key, copied, reference)
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


def read_normalization(
    mean: Tensor | None, std: Tensor | None, origin: str, own: Normalization
) -> Normalization:
    """What a checkpoint says that pictures are normalised by; its model's own where it is silent.

    Args:
        mean: three values by channel, of pictures of 0 to 255 or of 0 to 1.
        std: the same.
        origin: where they come from, for messages.
        own: of its model.

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
        own.mean if mean is None else _of_levels(mean),
        own.std if std is None else _of_levels(std),
    )
    usable = len(found.mean) == len(found.std) == 3
    if not usable or not all(map(math.isfinite, found.mean + found.std)) or min(found.std) <= 0:
        raise CheckpointError(
            f"{origin}: no picture of three channels can be normalised by its "
            f"{described(found, own)}; write three finite values of each into it, or none for "
            "SAM's own"
        )
    ours = [*own.mean, *own.std]
    pairs = zip(ours, [*found.mean, *found.std], strict=True)
    same = all(math.isclose(one, other, rel_tol=_SAME) for one, other in pairs)
    return own if same else found


def _of_levels(values: Tensor) -> tuple[float, ...]:
    """Means or deviations for values of 0 to 255, which those of 0 to 1 have below 1."""
    given = values.flatten().tolist()
    scale = _LEVELS if all(abs(value) <= 1 for value in given) else 1
    return tuple(scale * value for value in given)


def described(found: Normalization, own: Normalization) -> str:
    """A normalisation beside the model's own, for a message."""
    return (
        f"mean {_listed(found.mean)} and deviation {_listed(found.std)}, where SAM has "
        f"{_listed(own.mean)} and {_listed(own.std)}"
    )


def _listed(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


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
