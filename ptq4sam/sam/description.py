"""What may know the names of a network: which of its operators are quantized, what its parts are.

Patterns are full matches of paths from the root of a SAM. A family describes its image encoder;
what all families share is described in `decoder_description`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ptq4sam.sam.addresses import Address, Addressed

ENCODER = "image_encoder"
TRANSFORMER = "mask_decoder.transformer"
"""Paths in a SAM of the networks whose units are quantized."""
UPSCALING = "mask_decoder.output_upscaling"
"""Path of what brings the decoder's features to the size of masks: quantized where a scheme asks
for it."""
_NETWORKS = {ENCODER: "encoder", TRANSFORMER: "decoder", UPSCALING: "decoder"}


@dataclass(frozen=True)
class Place:
    """Operators that are quantized.

    Attributes:
        pattern: of their paths.
        roles: by slot, what a scheme can say: {"input": ("after-gelu",)}.
    """

    pattern: str
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Foldable:
    """Attentions whose query and key may change their signs together (bimodal integration).

    Attributes:
        pattern: of the module that owns the attention.
        query: projection below it.
        key: projection below it.
    """

    pattern: str
    query: str
    key: str


@dataclass(frozen=True)
class Projected:
    """Attentions whose query, key and value come from linear layers.

    Heads lie one after the other in a layer's outputs.

    Attributes:
        pattern: of the module that owns the attention.
        query: layer below it.
        key: layer below it.
        value: layer below it.
        part: which of how many equal parts of the key layer's outputs are keys.
    """

    pattern: str
    query: str
    key: str
    value: str
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Normalized:
    """Layers that alone read what a norm gives, element by element or beside zeros.

    Attributes:
        pattern: of the module that owns both.
        norm: below it.
        layer: below it.
    """

    pattern: str
    norm: str
    layer: str


@dataclass(frozen=True)
class Scaled:
    """Activations whose channels get factors, and the convolutions that alone read them.

    Attributes:
        pattern: of the module that owns both.
        activation: below it.
        layer: below it, 1x1.
    """

    pattern: str
    activation: str
    layer: str


@dataclass(frozen=True)
class Description:
    """A network, or several.

    Attributes:
        quantized: operators; the first place that fits counts.
        stays_float: patterns of modules that multiply floats.
        tables: patterns of modules with numbers of their own that multiply nothing.
        portable: patterns of float operators that compute portably where their network is
            quantized.
        parts: of the cost: beginnings of paths, and names; the first that fits counts. `@windows`
            stands behind the path of a product in one of many small attentions.
        sizes: of a file, in the same way.
        blocks: what repeats, as beginnings of paths.
        foldable: see there.
        projected: see there.
        normalized: see there.
        scaled: see there.
        addressed: operators with addresses; see `sam.addresses`.
        origin: names of tensors that no quantization changes, by which models of one float model
            are told.
        upscaling: as `quantized`, where a scheme quantizes the upscaling too.
        upscaling_portable: as `portable`, there.
    """

    quantized: tuple[Place, ...] = ()
    stays_float: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    portable: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ()
    foldable: tuple[Foldable, ...] = ()
    projected: tuple[Projected, ...] = ()
    normalized: tuple[Normalized, ...] = ()
    scaled: tuple[Scaled, ...] = ()
    addressed: tuple[Addressed, ...] = ()
    origin: tuple[str, ...] = ()
    upscaling: tuple[Place, ...] = ()
    upscaling_portable: tuple[str, ...] = ()

    def __add__(self, other: Description) -> Description:
        """Both together."""
        mine, theirs = vars(self), vars(other)
        return Description(**{name: value + theirs[name] for name, value in mine.items()})

    def with_upscaling(self) -> Description:
        """The same networks, with the upscaling among what is quantized."""
        return replace(
            self,
            quantized=self.quantized + self.upscaling,
            portable=self.portable + self.upscaling_portable,
            upscaling=(),
            upscaling_portable=(),
        )

    def place_of(self, path: str) -> Place | None:
        """The place among the quantized ones of a module; None for any other."""
        return next((p for p in self.quantized if re.fullmatch(p.pattern, path)), None)

    def scaled_at(self, path: str) -> Scaled | None:
        """Where channels below an owner get factors; None where they do not."""
        return next((s for s in self.scaled if re.fullmatch(s.pattern, path)), None)

    def address_of(self, path: str) -> Address | None:
        """The address of an operator; None where it has none."""
        for entry in self.addressed:
            if found := re.fullmatch(entry.pattern, path):
                groups = found.groupdict()
                block = entry.block + int(groups.get("block", 0))
                return Address(
                    entry.stage.format(groups.get("stage")), block, entry.layer, entry.kind
                )
        return None

    def may_multiply(self, path: str) -> bool:
        """Whether a module that is not quantized may have products."""
        return any(re.fullmatch(pattern, path) for pattern in self.stays_float)

    def may_hold(self, path: str) -> bool:
        """Whether a module that is not quantized may have numbers of its own."""
        known = self.stays_float + self.tables
        return any(re.fullmatch(pattern, path) for pattern in known)

    def is_portable(self, path: str) -> bool:
        """Whether a float operator computes portably."""
        return any(re.fullmatch(pattern, path) for pattern in self.portable)

    def foldable_at(self, path: str) -> Foldable | None:
        """How signs of an attention's owner are folded; None where they are not."""
        return next((f for f in self.foldable if re.fullmatch(f.pattern, path)), None)

    def projected_at(self, path: str) -> Projected | None:
        """Where query and key of an attention's owner come from; None where it is not known."""
        return next((p for p in self.projected if re.fullmatch(p.pattern, path)), None)

    def normalized_at(self, path: str) -> tuple[Normalized, ...]:
        """Pairs of norm and layer below a module."""
        return tuple(n for n in self.normalized if re.fullmatch(n.pattern, path))

    def roles(self, path: str, slot: str) -> frozenset[str]:
        """Roles of a slot of a quantized operator, with that of its network."""
        place = self.place_of(path)
        own = place.roles.get(slot, ()) if place is not None else ()
        return frozenset((*own, network_of(path)))

    def block_of(self, path: str) -> str:
        """The block that something in a network belongs to: what is in none is one by itself."""
        for pattern in self.blocks:
            found = re.match(pattern, path)
            if found is not None:
                return found[0]
        network = network_path(path)
        return f"{network}.{path.removeprefix(network + '.').partition('.')[0]}"

    def known_roles(self) -> frozenset[str]:
        """All that a scheme can name."""
        own = {r for place in self.quantized for roles in place.roles.values() for r in roles}
        return frozenset((*own, *_NETWORKS.values()))

    def part_of(self, path: str) -> str:
        """The part of the cost that something belongs to."""
        return first_fit(self.parts, path)

    def size_of(self, name: str) -> str:
        """The part of a file that a tensor belongs to."""
        return first_fit(self.sizes, name)


def first_fit(parts: Sequence[tuple[str, str]], path: str) -> str:
    """The name of the first pattern that a path begins with."""
    return next((name for pattern, name in parts if re.match(pattern, path)), "other")


def network_path(path: str) -> str:
    """The network, ENCODER or TRANSFORMER, that a path leads to; empty elsewhere."""
    found = (n for n in _NETWORKS if path == n or path.startswith(f"{n}."))
    return next(found, "")


def network_of(path: str) -> str:
    """The role of all slots of a network: "encoder" or "decoder"; empty elsewhere."""
    return _NETWORKS.get(network_path(path), "")
