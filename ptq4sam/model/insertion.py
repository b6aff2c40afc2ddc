"""Put quantizers into a SAM, by the description of its networks and the registry of operators.

The same list for every bit width, without an exception for first or last layers but those that a
scheme lists.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from ptq4sam.errors import ConfigError
from ptq4sam.methods.assignment import make_quantizer
from ptq4sam.methods.pcc import AttentionParts
from ptq4sam.model.checks import check_operators, check_slots, check_units
from ptq4sam.model.float_weights import round_float_weights
from ptq4sam.operators.activation import PortableChannelGELU, with_factors
from ptq4sam.operators.base import (
    PORTABLE,
    QUANTIZED,
    SOFTMAX,
    QuantizedLayer,
    as_layer,
    quantized_operators,
)
from ptq4sam.operators.simulated import SIMULATED
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Quantizer
from ptq4sam.quantization.scheme import STUDY, Scheme
from ptq4sam.sam.addresses import Address, is_address, select
from ptq4sam.sam.description import (
    ENCODER,
    TRANSFORMER,
    UPSCALING,
    Description,
    Projected,
    network_of,
)
from ptq4sam.sam.model import Sam
from ptq4sam.sam.stages import Stage

__all__ = ["ENCODER", "TRANSFORMER"]


@dataclass(frozen=True)
class QuantizerFactory:
    """Makes the quantizers that a scheme asks for."""

    scheme: Scheme

    def at_level(self, level: int | str | None) -> QuantizerFactory | None:
        """The factory for what has a level of its own (see `Scheme.at_level`); None of float."""
        scheme = self.scheme.at_level(level)
        return None if scheme is None else QuantizerFactory(scheme)

    def make(self, slot: str, roles: frozenset[str]) -> Quantizer:
        """The quantizer of a slot.

        Args:
            slot: of an operator, see `operators.base`.
            roles: that the slot has, see `Description.roles`.
        """
        return make_quantizer(self.scheme, slot, roles)


class QuantizedSam(Sam):
    """A SAM with quantizers; evaluate it like a float one.

    Attributes:
        scheme: how it is quantized.
        encoder_quantized: whether the image encoder is quantized too.
        folded: names of the attentions whose signs bimodal integration folded.
        applied: by method, paths of what it changed; not in files.
    """

    def __init__(self, sam: Sam, scheme: Scheme, encoder_quantized: bool) -> None:
        parts = (sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)
        description = sam.description
        if scheme.upscaling == "quantized":
            description = description.with_upscaling()
        super().__init__(sam.name, *parts, sam.geometry, description)
        self.to(sam.device)
        self.scheme = scheme
        self.encoder_quantized = encoder_quantized
        self.folded: list[str] = []
        self.applied: dict[str, list[str]] = {}
        self._exceptions: tuple[Scheme, dict[str, int | str]] | None = None

    def scaled_layers(self) -> dict[str, PortableChannelGELU]:
        """Activations with factors, by path of the convolution that alone reads each."""
        found = {}
        for path, owner in self.named_modules():
            pair = self.description.scaled_at(path)
            if pair is None or pair.activation not in dict(owner.named_modules()):
                continue
            activation = with_factors(owner.get_submodule(pair.activation))
            if activation is not None:
                found[f"{path}.{pair.layer}"] = activation
        return found

    def addresses(self) -> dict[str, Address]:
        """Addresses of operators, by path."""
        found = ((name, self.description.address_of(name)) for name, _ in self.named_modules())
        return {name: address for name, address in found if address is not None}

    @property
    def exceptions(self) -> dict[str, int | str]:
        """Levels of what the scheme does not quantize as the rest, by path of unit or operator.

        Raises:
            FieldError: it names an address that there is not.
        """
        if self._exceptions is None or self._exceptions[0] is not self.scheme:
            known, found = self.addresses(), dict[str, int | str]()
            for name, level in self.scheme.units.items():
                for path in select(name, self.name, known) if is_address(name) else [name]:
                    # The last of several is the last in order too.
                    found.pop(path, None)
                    found[path] = level
            self._exceptions = self.scheme, found
        return self._exceptions[1]

    def level_of(self, path: str) -> int | str | None:
        """The level of something in the model, where the scheme makes an exception of it."""
        level = None
        for name, its in self.exceptions.items():
            if path == name or path.startswith(f"{name}."):
                level = its
        return level

    def foldable(self) -> dict[str, tuple[nn.Linear, nn.Linear]]:
        """Query and key projections whose signs may be flipped, by name in the transformer."""
        return foldable(self.transformer, TRANSFORMER, self.description)

    def attention_parts(self) -> dict[str, AttentionParts]:
        """Quantized attentions of the mask decoder in their order, by path of their owners."""
        found = {}
        for path, owner, projected in _projections(self):
            operators = dict(quantized_operators(owner))
            core = next((o for o in operators.values() if SOFTMAX in o.slot_names), None)
            if core is not None and network_of(path) == "decoder":
                names = (projected.query, projected.key, projected.value)
                query, key, value = (cast(QuantizedLayer, operators[name]) for name in names)
                found[path] = AttentionParts(owner, query, key, value, core)
        return found

    def key_outputs(self) -> dict[str, tuple[QuantizedLayer, slice]]:
        """Linear layers that give keys of attentions, and which of their channels do.

        Those of units that stay float are none of them.
        """
        found: dict[str, tuple[QuantizedLayer, slice]] = {}
        for path, owner, projected in _projections(self):
            layer = as_layer(owner.get_submodule(projected.key))
            if layer is None:
                continue
            place, parts = projected.part
            width = len(layer.weight) // parts
            channels = slice(place * width, (place + 1) * width)
            found[f"{path}.{projected.key}"] = (layer, channels)
        return found

    def normalized_layers(self) -> dict[str, str]:
        """Paths of quantized layers that alone read what a norm gives, with that of the norm."""
        found = {}
        for path, owner in self.named_modules():
            for pair in self.description.normalized_at(path):
                if as_layer(owner.get_submodule(pair.layer)) is not None:
                    found[f"{path}.{pair.layer}"] = f"{path}.{pair.norm}"
        return found


def _projections(sam: QuantizedSam) -> Iterator[tuple[str, nn.Module, Projected]]:
    """Owners of attentions with their paths, where the network is quantized."""
    for path, owner in sam.named_modules():
        projected = sam.description.projected_at(path)
        if projected is not None and (sam.encoder_quantized or network_of(path) == "decoder"):
            yield path, owner, projected


def foldable(
    network: nn.Module, path: str, description: Description
) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """Query and key projections whose signs may be flipped together, by their owner's name.

    Args:
        network: that has them.
        path: of it in the model.
        description: of the model.
    """
    return {
        name: (
            cast(nn.Linear, owner.get_submodule(found.query)),
            cast(nn.Linear, owner.get_submodule(found.key)),
        )
        for name, owner in network.named_modules()
        if (found := description.foldable_at(f"{path}.{name}")) is not None
    }


def insert_quantizers(sam: Sam, scheme: Scheme, quantize_encoder: bool = True) -> QuantizedSam:
    """Copy a float SAM and put quantizers into the copy, not yet calibrated.

    Raises:
        ConfigError: the scheme makes an exception for a unit that there is not, or an operator has
            no quantized form, or is in no list of its family's, or `compat: study` has no batch
            normalisations to simulate.
    """
    _check_norms(sam, scheme)
    quantized = QuantizedSam(copy.deepcopy(sam), scheme, quantize_encoder)
    units = [name for name, _ in model_units(quantized)]
    check_units(quantized, scheme, units, quantized.addresses())
    check_operators(quantized)
    check_slots(quantized, scheme)
    description = quantized.description
    for name in units:
        insert_into(quantized, name, description, QuantizerFactory(scheme), quantized.level_of)
    if scheme.upscaling == "quantized":
        factory = QuantizerFactory(scheme)
        insert_into(quantized, UPSCALING, description, factory, quantized.level_of)
    if scheme.compat != STUDY:
        make_portable(quantized, description, quantize_encoder)
    name_quantizers(quantized)
    if scheme.float_weights == "float16":
        round_float_weights(quantized)
    # Quantizers were made on torch's default device.
    return quantized.eval().requires_grad_(False).to(sam.device)


def _check_norms(sam: Sam, scheme: Scheme) -> None:
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in sam.modules())
    if scheme.compat == STUDY and not normalized:
        raise ConfigError(
            f"compat: study simulates batch normalisations, which this {sam.name} has not, or not "
            "any more: load an EfficientViT-SAM by load_sam(..., folded=False)"
        )


def name_quantizers(module: nn.Module) -> None:
    """Tell each quantizer its path, for messages."""
    for name, quantizer in quantizers(module):
        quantizer.name = name


def insert_into(
    root: nn.Module,
    path: str,
    description: Description,
    factory: QuantizerFactory,
    level_of: Callable[[str], int | str | None] = lambda _path: None,
) -> None:
    """Replace what is to be quantized below a path by its quantized form, in place.

    Args:
        root: a SAM, or something with its paths.
        path: of a unit or a network.
        description: of the SAM.
        factory: makes quantizers.
        level_of: what has a level of its own, by path.

    Raises:
        ConfigError: an operator has no quantized form.
    """
    for name, operator in _below(root, path):
        own = factory.at_level(level_of(name))
        if description.place_of(name) is None or own is None:
            continue
        forms = SIMULATED if own.scheme.compat == STUDY else QUANTIZED
        form = forms.get(type(operator))
        if form is None:
            known = ", ".join(sorted(kind.__name__ for kind in forms))
            raise ConfigError(
                f"{name} is to be quantized, but a {type(operator).__name__} has no quantized "
                f"form: {known} have one"
            )

        def make(
            slot: str, name: str = name, own: QuantizerFactory = own, kind: str = form.kind
        ) -> Quantizer:
            return own.make(slot, description.roles(name, slot) | {kind})

        try:
            _put(root, name, form.of(operator, make))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def make_portable(root: nn.Module, description: Description, encoder: bool) -> None:
    """Let what lies between quantizers compute portably, in place; parameters stay.

    Args:
        root: a SAM, or something with its paths.
        description: says what.
        encoder: whether the image encoder is quantized; a float one is left alone.
    """
    for name, operator in list(root.named_modules()):
        in_encoder = network_of(name) == "encoder"
        if description.is_portable(name) and (encoder or not in_encoder):
            try:
                _put(root, name, PORTABLE[type(operator)].of(operator))
            except (ConfigError, KeyError) as error:
                kind = type(operator).__name__
                raise ConfigError(
                    f"{name} lies between quantizers, but this {kind} has no portable form"
                ) from error


def _below(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    inner = root.get_submodule(path).named_modules()
    return [(f"{path}.{name}" if name else path, module) for name, module in inner]


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def model_units(sam: QuantizedSam, *, joint: bool = False) -> list[tuple[str, nn.Module]]:
    """All units of a model in execution order, with their paths in it.

    Args:
        sam: the model.
        joint: cross attentions of a decoder's block are one unit (recon.granularity).
    """
    parts: list[tuple[str, list[Stage]]] = []
    if sam.encoder_quantized:
        parts.append((ENCODER, sam.image_encoder.stages()))
    parts.append((TRANSFORMER, sam.transformer.stages(joint=joint)))
    return [(f"{path}.{stage.name}", stage.unit) for path, stages in parts for stage in stages]


def folded_layers(sam: QuantizedSam) -> Iterator[str]:
    """Paths of the projections whose signs bimodal integration folded."""
    for name in sam.folded:
        path = f"{TRANSFORMER}.{name}"
        foldable = sam.description.foldable_at(path)
        if foldable is not None:
            yield from (f"{path}.{foldable.query}", f"{path}.{foldable.key}")
