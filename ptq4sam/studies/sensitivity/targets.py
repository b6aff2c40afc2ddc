"""What a study switches on and off: parts of a model by network, block, unit, quantizer and role.

A target is named by the path of a part, or by the path and a role, as `image_encoder.UNIT:softmax`.
Patterns with `*` and `?` name several; a layer is named by its address.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptq4sam.errors import ConfigError
from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.quantization.modes import quantizers
from ptq4sam.records import FieldError, unknown_key
from ptq4sam.sam.addresses import is_address, label, select
from ptq4sam.sam.description import Description, network_path

MODEL = "model"
LAYER = "layer"
GRAINS = (MODEL, "network", "block", "unit", LAYER, "quantizer")
"""How large the parts are: all of it, encoder or decoder, a block, a unit, what shares an address
(`sam.addresses`), a single quantizer."""

ROLES = ("weights", "activations", "inputs", "query", "key", "value", "softmax", "state", "outputs")
"""What a quantizer is for; `activations` are all but weights, `outputs` those of `compat: study`.
"""

_ROLE_OF = {
    "weight_quantizer": "weights",
    "input_quantizer": "inputs",
    "query_quantizer": "query",
    "key_quantizer": "key",
    "value_quantizer": "value",
    "softmax_quantizer": "softmax",
    "state_quantizer": "state",
    "positive_query_quantizer": "query",
    "positive_key_quantizer": "key",
    "sums_quantizer": "outputs",
    "output_quantizer": "outputs",
}


@dataclass(frozen=True)
class Target:
    """Quantizers that are switched together.

    Attributes:
        path: of the part of the model; "model" for all of it.
        role: what they are for; empty for all of the part.
        grain: one of GRAINS.
        quantizers: their paths.
        first_unit: path of the first unit that has one of them.
        place: network, block in it and layer in that; empty where the target has several.
    """

    path: str
    role: str
    grain: str
    quantizers: frozenset[str]
    first_unit: str
    place: tuple[str, str, str]

    @property
    def name(self) -> str:
        """Path and role."""
        return f"{self.path}:{self.role}" if self.role else self.path


def role_of(quantizer: str) -> str:
    """What a quantizer is for, by its path."""
    return _ROLE_OF[quantizer.rpartition(".")[2]]


def targets_of(
    sam: QuantizedSam,
    grains: Sequence[str] = ("unit",),
    roles: Sequence[str] = ROLES,
    patterns: Sequence[str] = (),
) -> list[Target]:
    """All targets of a model, in the order of grains and of execution.

    A role that a part has alone, or not at all, makes no target of its own.

    Args:
        sam: the model.
        grains: some of GRAINS.
        roles: split parts by some of ROLES, beside all of each part.
        patterns: keep those that match one; none keeps all.

    Raises:
        ConfigError: a grain or role is unknown, or a pattern matches nothing.
    """
    for given, known in ((grains, GRAINS), (roles, ROLES)):
        for name in given:
            if name not in known:
                raise unknown_key(name, known)
    units = [
        (unit, f"{unit}.{name}")
        for unit, module in model_units(sam)
        for name, _ in quantizers(module)
    ]
    found: list[Target] = []
    for grain in GRAINS:
        if grain in grains:
            parts: dict[str, list[tuple[str, str]]] = {}
            for unit, quantizer in units:
                parts.setdefault(_part(sam, grain, unit, quantizer), []).append((unit, quantizer))
            # What has no address is no layer.
            parts.pop("", None)
            for path, members in parts.items():
                place = _place(sam.description, path, members[0][1])
                found.extend(_split(path, place, grain, members, roles))
    return _matching(sam, found, patterns)


def _part(sam: QuantizedSam, grain: str, unit: str, quantizer: str) -> str:
    """Path of the part of a grain that a quantizer belongs to; empty where it is in none."""
    if grain in (MODEL, "unit", "quantizer"):
        return {MODEL: MODEL, "unit": unit, "quantizer": quantizer}[grain]
    if grain == LAYER:
        address = sam.description.address_of(quantizer.rpartition(".")[0])
        return "" if address is None else f"{label(sam.name)}:{address}"
    return network_path(unit) if grain == "network" else sam.description.block_of(unit)


def _place(networks: Description, path: str, member: str) -> tuple[str, str, str]:
    if is_address(path):
        _, stage, block, layer = path.split(":")
        return network_path(member), f"{stage}:{block}", layer
    network = network_path(path)
    if path in (network, MODEL):
        return network, "", ""
    block = networks.block_of(path)
    return network, block.removeprefix(f"{network}."), path.removeprefix(block).removeprefix(".")


def _split(
    path: str,
    place: tuple[str, str, str],
    grain: str,
    members: Sequence[tuple[str, str]],
    roles: Sequence[str],
) -> Iterable[Target]:
    """All of a part, then by role."""
    every = frozenset(quantizer for _, quantizer in members)
    role = role_of(members[0][1]) if grain == "quantizer" else ""
    yield Target(path, role, grain, every, members[0][0], place)
    seen = {every}
    for role in ROLES:
        chosen = [(u, q) for u, q in members if role_of(q) == role]
        if role == "activations":
            chosen = [(u, q) for u, q in members if role_of(q) != "weights"]
        those = frozenset(quantizer for _, quantizer in chosen)
        if role in roles and those and those not in seen:
            seen.add(those)
            yield Target(path, role, grain, those, chosen[0][0], place)


def _matching(sam: QuantizedSam, found: Sequence[Target], patterns: Sequence[str]) -> list[Target]:
    """Targets that a pattern names; a pattern without role names those of all roles too."""
    kept: set[str] = set()
    for pattern in patterns:
        names = (
            _addressed(sam, found, pattern)
            if pattern.count(":") >= 3
            else {
                target.name
                for target in found
                if fnmatch.fnmatchcase(target.name if ":" in pattern else target.path, pattern)
            }
        )
        if not names:
            known = [target.name if ":" in pattern else target.path for target in found]
            error = unknown_key(pattern, dict.fromkeys(known))
            raise ConfigError(
                f"target {error.key}: no such part of the model; {error.problem.partition('; ')[2]}"
            )
        kept |= names
    return [target for target in found if target.name in kept] if patterns else list(found)


def _addressed(sam: QuantizedSam, found: Sequence[Target], pattern: str) -> set[str]:
    """Names of the layers that an address names, perhaps with a role behind it.

    Raises:
        ConfigError: there is none, or layers are not asked for.
    """
    if not any(target.grain == LAYER for target in found):
        raise ConfigError(f"target {pattern}: addresses are of layers: ask for the grain {LAYER}")
    address, role = ":".join(pattern.split(":")[:4]), ":".join(pattern.split(":")[4:])
    known = sam.addresses()
    try:
        paths = select(address, sam.name, known)
    except FieldError as error:
        raise ConfigError(f"target {error.key}: {error.problem}") from error
    layers = {f"{label(sam.name)}:{known[path]}" for path in paths}
    names = {t.name for t in found if t.path in layers and role in ("", t.role)}
    if not names:
        raise ConfigError(f"target {pattern}: names no layer that is quantized")
    return names
