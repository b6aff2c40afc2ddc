"""Where in a checkpoint a SAM is: under which entries, behind which prefixes of its names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4sam.errors import CheckpointError
from ptq4sam.families.foreign import refuse_foreign
from ptq4sam.families.weight_file import SAVE_AGAIN

_PARTS = {
    "image_encoder": "image encoder",
    "vision_encoder": "image encoder",
    "prompt_encoder": "prompt encoder",
    "mask_decoder": "mask decoder",
    "shared_image_embedding": "prompt encoder",
}
"""What names of an official SAM, and of Hugging Face's SamModel, begin with."""

# A tensor of each part that was saved alone.
_ALONE = {
    "neck.0.weight": "image encoder",
    "point_embeddings.0.weight": "prompt encoder",
    "mask_tokens.weight": "mask decoder",
}
_INNER_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DataParallel, torch.compile and others put between the names of modules."""

# Copies that a training averages: ema, model_ema, state_dict_ema, swa_model, averaged_model.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged)(?:[._]|$)", re.IGNORECASE)
_NORMALIZATION = ("pixel_mean", "pixel_std")
_NAMED_AT_ONCE = 5

_Path = tuple[str, ...]


@dataclass(frozen=True)
class FoundState:
    """A SAM's tensors in a checkpoint.

    Attributes:
        tensors: by name without prefixes; names that are no SAM's are those in the file.
        pixel_mean: what pictures are normalised by, if the checkpoint says so.
        pixel_std: the same.
        notes: what was taken off or passed over, for people.
    """

    tensors: dict[str, Tensor]
    pixel_mean: Tensor | None
    pixel_std: Tensor | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Named:
    """A tensor and where it was.

    Attributes:
        path: keys of the mapping that it is in.
        key: its own.
        prefix: what stands in the key before the SAM's name.
        name: the SAM's name, without wrappers.
        tensor: itself.
    """

    path: _Path
    key: str
    prefix: str
    name: str
    tensor: Tensor

    @property
    def part(self) -> str | None:
        """The part of a SAM that it belongs to."""
        return _PARTS.get(self.name.partition(".")[0])

    @property
    def root(self) -> str:
        """Whatever stands before the SAM's name, in the file and in the key."""
        return ".".join((*self.path, self.prefix))


def find_state(
    content: object, origin: str, check: Callable[[list[str], str], None] = refuse_foreign
) -> FoundState:
    """Find a SAM's tensors in what a file holds.

    They may lie in mappings (`model`, `state_dict`, ...) beside other things, and their names may
    have prefixes (`module.`, `model.sam.`, ...). Of weights and an average of them, the weights
    are taken.

    Args:
        content: a state dict, or mappings with one somewhere in them.
        origin: where it comes from, for messages.
        check: refuses models by their names, given with the origin.

    Raises:
        CheckpointError: there are no tensors, no whole SAM, several, or another model.
    """
    mappings = dict(_mappings(content, set()))
    tensors = [named for path, mapping in mappings.items() for named in _named(path, mapping)]
    if not tensors:
        raise CheckpointError(
            f"{origin}: holds no named tensors, but {_described(content)}; save a state dict of "
            f"tensors: {SAVE_AGAIN}"
        )
    check([named.name if named.part else named.key for named in tensors], origin)
    parts = [named for named in tensors if named.part is not None]
    _require_whole(parts, tensors, origin)
    chosen = _chosen(parts, origin)
    taken = {named.path for named in chosen.values()}
    beside = [named for named in tensors if named.path in taken and named.part is None]
    constants = _constants(mappings, taken, origin)
    # A lone number or whole numbers (steps, a loss, a random state) are no weights.
    counts = [n for n in beside if n.tensor.dim() == 0 or not n.tensor.is_floating_point()]
    unknown = [n for n in beside if n not in counts and _last(n.key) not in _NORMALIZATION]
    state = {name: named.tensor for name, named in chosen.items()}
    passed_over = [*_passed_over(mappings, taken), *(named.key for named in counts)]
    return FoundState(
        state | {named.key: named.tensor for named in unknown},
        constants.get("pixel_mean"),
        constants.get("pixel_std"),
        tuple(_notes(chosen, parts, passed_over)),
    )


def _mappings(
    content: object, seen: set[int], path: _Path = ()
) -> Iterator[tuple[_Path, Mapping[Any, Any]]]:
    """A mapping and those in it, each once, by the keys that lead there; lists have numbers."""
    if isinstance(content, (Mapping, list, tuple)) and id(content) not in seen:
        seen.add(id(content))
        if not isinstance(content, Mapping):
            content = {str(place): value for place, value in enumerate(content)}
        yield path, content
        for key, value in content.items():
            yield from _mappings(value, seen, (*path, str(key)))


def _named(path: _Path, mapping: Mapping[Any, Any]) -> Iterator[_Named]:
    above = ".".join(path).split(".") if path else []
    for key, tensor in mapping.items():
        if isinstance(tensor, Tensor):
            words = [*above, *str(key).split(".")]
            # The last, for a wrapper may have the name of a part too. Parts may be entries.
            first = max((n for n, word in enumerate(words) if word in _PARTS), default=len(above))
            name = ".".join(word for word in words[first:] if word not in _INNER_WRAPPERS)
            prefix = "".join(f"{word}." for word in words[len(above) : first])
            yield _Named(path, str(key), prefix, name, tensor)


def _constants(
    mappings: Mapping[_Path, Mapping[Any, Any]], taken: Collection[_Path], origin: str
) -> dict[str, Tensor]:
    """What pictures are normalised by, by name: beside the weights, or else anywhere."""
    constants: dict[str, Tensor] = {}
    for path in sorted(mappings, key=lambda path: path in taken):
        for key, value in mappings[path].items():
            if (name := _last(str(key))) in _NORMALIZATION:
                try:
                    constants[name] = torch.as_tensor(value, dtype=torch.float32, device="cpu")
                except (TypeError, ValueError, RuntimeError) as error:
                    raise CheckpointError(
                        f"{origin}: its {key} cannot be read; write it as a tensor or a list of "
                        "three values"
                    ) from error
    return constants


def _described(content: object) -> str:
    """What a file holds that has no tensors by name, for a message."""
    if not isinstance(content, Mapping) or not content:
        return type(content).__name__
    return f"{type(content).__name__} with {_some([str(key) for key in content])}"


def _last(key: str) -> str:
    """The last word of a key."""
    return key.rpartition(".")[2]


def _require_whole(parts: Sequence[_Named], tensors: Sequence[_Named], origin: str) -> None:
    """Refuse what lacks a part of a SAM."""
    there = {named.part for named in parts}
    keys = [named.key for named in tensors]
    if not parts:
        there = {part for end, part in _ALONE.items() if any(key.endswith(end) for key in keys)}
    if not there:
        raise CheckpointError(f"{origin}: holds no SAM, but {_some(keys)}; give a SAM's state dict")
    absent = sorted({*_PARTS.values()} - there)
    if absent:
        raise CheckpointError(
            f"{origin}: holds the {' and '.join(sorted(map(str, there)))} of a SAM, but no "
            f"{' and no '.join(absent)}; load it into the whole SAM that it belongs to, and save "
            f"that: {SAVE_AGAIN}"
        )


def _chosen(parts: Iterable[_Named], origin: str) -> dict[str, _Named]:
    """One tensor for each name."""
    parts = list(parts)
    chosen: dict[str, _Named] = {}
    for named in [n for n in parts if not _AVERAGED.search(n.root)] or parts:
        other = chosen.setdefault(named.name, named)
        same = other.tensor is named.tensor or (
            other.tensor.shape == named.tensor.shape and other.tensor.equal(named.tensor)
        )
        if not same:
            raise CheckpointError(
                f"{origin}: holds more than one SAM, under {other.root!r} and {named.root!r}; "
                f"save the one that is meant alone: {SAVE_AGAIN}"
            )
    return chosen


def _passed_over(
    mappings: Mapping[_Path, Mapping[Any, Any]], taken: Collection[_Path]
) -> Iterator[str]:
    """Keys beside the SAM's tensors and beside the entries that lead to them."""
    leading = {path[:length] for path in taken for length in range(len(path) + 1)}
    for path in sorted(leading):
        for key, value in mappings[path].items():
            used = isinstance(value, Tensor) and path in taken
            if not used and (*path, str(key)) not in leading:
                yield str(key)


def _notes(
    chosen: Mapping[str, _Named], parts: Sequence[_Named], passed_over: Sequence[str]
) -> Iterator[str]:
    entries = dict.fromkeys(".".join(named.path) for named in chosen.values() if named.path)
    if entries:
        yield f"the weights are under {_quoted(entries)}"
    prefixes = dict.fromkeys(named.prefix for named in chosen.values() if named.prefix)
    inner = {
        f"{word}."
        for named in chosen.values()
        for word in named.key.removeprefix(named.prefix).split(".")
        if word in _INNER_WRAPPERS
    }
    if taken_off := list(dict.fromkeys([*prefixes, *sorted(inner)])):
        were = "prefix {} was" if len(taken_off) == 1 else "prefixes {} were"
        yield f"the {were.format(_quoted(taken_off))} taken off"
    averages = dict.fromkeys(
        n.root for n in parts if n not in chosen.values() and _AVERAGED.search(n.root)
    )
    if averages:
        yield f"the average under {_quoted(averages)} was not taken"
    if passed_over:
        yield f"passed over {_some(list(dict.fromkeys(passed_over)))}"


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"{name!r}" for name in names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_ONCE} more" if len(names) > _NAMED_AT_ONCE else ""
    return ", ".join(names[:_NAMED_AT_ONCE]) + more
