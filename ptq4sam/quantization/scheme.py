"""Schemes: the frozen, validated description of a quantization.

A scheme is read from YAML with the keys and values of the published PTQ4SAM configurations
(exp/config44.yaml) and some of our own, marked below. Only grids and methods by name need torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from ptq4sam.quantization.formats import LEARNED_SCALE_QUANTIZER_NAMES, TensorFormat
from ptq4sam.quantization.levels import FLOAT, LEVELS, bits_of_level
from ptq4sam.quantization.published import BIMODAL, Methods
from ptq4sam.quantization.recon import Reconstruction
from ptq4sam.quantization.registry import METHODS, QUANTIZERS
from ptq4sam.quantization.slots import (
    ADAROUND,
    AFFINE,
    STATE,
    WEIGHT,
    SlotFormat,
    octaves,
    require_heads,
    selected,
    slot_formats,
)
from ptq4sam.records import FieldError, NoSettings, Record
from ptq4sam.shipped import SCHEMES, find
from ptq4sam.yaml_files import read_yaml

STUDY: Literal["study"] = "study"
SIMULATIONS = {
    "published": "is not on its grid",
    STUDY: "quantizes results between float operations, as no device does",
}
"""What of a scheme's `compat` keeps a model from being saved, exported or deployed."""

_MOST_BITS = 16
_HIGHEST_RAISE = 100.0
"""Of learning rates, when a scheme is run with fewer steps."""


def _by_name(methods: Mapping[str, object] | tuple[object, ...]) -> Iterator[tuple[str, object]]:
    """Names and settings of a section, or of a list of names and of sections of one method."""
    if isinstance(methods, Mapping):
        yield from methods.items()
        return
    for item in methods:
        if isinstance(item, str):
            yield item, None
        elif isinstance(item, Mapping) and len(item) == 1:
            yield from item.items()
        else:
            raise FieldError("methods", f"{item} given in the list, names or name: settings needed")


def _with_settings(methods: Mapping[str, object] | tuple[object, ...]) -> dict[str, Record]:
    """Methods by name with records of their settings, from what a scheme says."""
    found: dict[str, Record] = {}
    for name, settings in _by_name(methods):
        METHODS.require(name, "methods")
        kind = METHODS[name].settings_type
        if settings and kind is NoSettings and not isinstance(settings, kind):
            given = ", ".join(map(str, settings)) if isinstance(settings, Mapping) else settings
            raise FieldError(
                "methods",
                f"{name} has no settings, {given} given: leave it out; a method of your own names "
                "the record of its settings by settings_type",
            )
        try:
            found[name] = (
                settings if isinstance(settings, kind) else kind.from_section(settings or {})
            )
        except FieldError as error:
            raise error.within(f"methods.{name}") from None
    return found


PRESETS = {"quick": 500, "standard": 5_000, "paper": 20_000}
"""Numbers of reconstruction steps a unit, by name."""


@dataclass(frozen=True)
class Scheme(Record):
    """A quantization: formats, methods and reconstruction.

    Attributes:
        a_qconfig: format of the activations, per tensor; `slots` may give heads scales.
        w_qconfig: format of the weights.
        calibrate: number of calibration pictures.
        calibrate_order: ours; "file" takes the first pictures, as published, so that by statistics
            alone every seed gives the same model; "random" draws them by the run's seed.
        recon: reconstruction settings; None (no such section) calibrates by statistics only.
        ptq4sam: bimodal integration and adaptive granularity; without the section both are off.
        float_weights: ours; "float16" rounds the weights and tables that no quantizer touches
            (position embedding, patch embedding, upscaling, ...) to half precision before
            calibration, so that what is evaluated is what the file holds; this takes 2.5 % of the
            float32 file's size off that of a quantized ViT-B. "float32" leaves them exact.
        units: ours; units that are not quantized as the rest, by their path in the model,
            all of a network by its path, or single layers by their address (`sam.addresses`): bits
            of their weights and activations (4), both apart ("w4a8"), or "float"; of several the
            last counts. Accuracy control and `ptq4sam mixed` write them.
        upscaling: ours; "quantized" quantizes the mask decoder's upscaling too, by statistics
            alone, so that there can be no `recon`.
        slots: ours; what single kinds of slots have instead, by slot and role, as
            `input@after-gelu: {grid: hybrid}`: a grid of GRIDS with its settings and perhaps `bit`,
            or for an affine one other fields of its format. See `quantization.slots`.
        methods: ours; names in METHODS with their settings, or a list of them; each may change the
            model before ranges, after ranges and after reconstruction, in this order.
        compat: ours; "published" leaves activations dropped and roundings soft after
            reconstruction, as the published implementation does, to reproduce its numbers; they
            are not those of a quantized model. "study" simulates a network of convolutions as a
            published study does (`operators.simulated`): results are quantized too, between float
            operations, and batch normalisations are not folded.
    """

    a_qconfig: TensorFormat
    w_qconfig: TensorFormat
    calibrate: int = 32
    calibrate_order: Literal["file", "random"] = "file"
    recon: Reconstruction | None = None
    ptq4sam: Methods = field(default_factory=Methods)
    float_weights: Literal["float16", "float32"] = "float16"
    units: dict[str, int | str] = field(default_factory=dict)
    upscaling: Literal["float", "quantized"] = "float"
    slots: dict[str, object] = field(default_factory=dict)
    methods: dict[str, object] | tuple[object, ...] = field(default_factory=dict)
    compat: Literal["faithful", "published", "study"] = "faithful"

    def _validate(self) -> None:
        self._require(self.calibrate >= 1, "calibrate", "1 or more")
        object.__setattr__(self, "slots", slot_formats(self.slots))
        object.__setattr__(self, "methods", _with_settings(self.methods))
        for name, level in self.units.items():
            try:
                bits = bits_of_level(level) or ()
            except FieldError as error:
                raise error.within(f"units.{name}") from None
            if not all(2 <= each <= 16 for each in bits):
                raise FieldError(f"units.{name}", f"{level} given, allowed: {LEVELS}")
        for section, slot in (("w_qconfig", WEIGHT), ("a_qconfig", "all activations")):
            try:
                require_heads(getattr(self, section).ch_axis, slot)
            except FieldError as error:
                raise error.within(section) from None
        if self.a_qconfig.group_size:
            raise FieldError(
                "a_qconfig.group_size",
                "groups of channels of activations are a grid: slots: {input: {grid: grouped}}",
            )
        weights = self.w_qconfig
        if weights.group_size and not octaves(weights.bit, weights.symmetric):
            most = 7 if weights.symmetric else 6
            raise FieldError(
                "w_qconfig.group_size",
                f"scales of groups are powers of two within a byte, of which {weights.bit} bits "
                f"leave none: use up to {most} bits, or granularity: per channel",
            )
        if self.a_qconfig.ch_axis != -1:
            raise FieldError("a_qconfig.ch_axis", "activations are quantized per tensor: -1")
        if self.a_qconfig.quantizer == ADAROUND:
            allowed = ", ".join(name for name in QUANTIZERS.names if name != ADAROUND)
            raise FieldError(
                "a_qconfig.quantizer", f"{ADAROUND} is for weights; allowed: {allowed}"
            )
        for selector in self.slot_formats:
            slot, *roles = selector.split("@")
            try:
                self.format_of(slot, frozenset(roles))
            except FieldError as error:
                raise error.within(f"slots.{selector}") from None
        if self.compat == STUDY and (self.recon is not None or self.upscaling != FLOAT):
            raise FieldError(
                "compat", "study given, which simulates ranges alone: leave recon and upscaling out"
            )
        if self.recon is not None:
            self._check_learning(self.recon)
            if self.upscaling != FLOAT:
                raise FieldError(
                    "upscaling",
                    "quantized given with recon, whose units end at the decoder's transformer: "
                    "leave one of them away",
                )

    def _check_learning(self, recon: Reconstruction) -> None:
        if recon.learn_rounding and self.w_qconfig.quantizer != ADAROUND:
            raise FieldError(
                "recon.learn_rounding",
                f"needs w_qconfig.quantizer {ADAROUND}, not {self.w_qconfig.quantizer}",
            )
        if recon.learn_scale and self.a_qconfig.quantizer not in LEARNED_SCALE_QUANTIZER_NAMES:
            raise FieldError(
                "recon.learn_scale",
                f"needs a_qconfig.quantizer {' or '.join(LEARNED_SCALE_QUANTIZER_NAMES)}, "
                f"not {self.a_qconfig.quantizer}; set it to false to learn the rounding alone",
            )

    def of_unit(self, name: str) -> Scheme | None:
        """The scheme of one unit, without exceptions; None for a unit that stays float."""
        return self.at_level(self.units.get(name))

    def at_level(self, level: int | str | None) -> Scheme | None:
        """The scheme of what `units` says a level of, without exceptions; None of float.

        Bits of a unit are those of all its slots.

        Args:
            level: None of what is quantized as the rest.
        """
        if level is None:
            return replace(self, units={}) if self.units else self
        bits = bits_of_level(level)
        if bits is None:
            return None
        slots: dict[str, object] = {
            selector: replace(said, bit=None) for selector, said in self.slot_formats.items()
        }
        return replace(self, units={}, slots=slots).with_bits(*bits)

    @property
    def slot_formats(self) -> dict[str, SlotFormat]:
        """`slots`, read."""
        return cast(dict[str, SlotFormat], self.slots)

    @property
    def method_settings(self) -> dict[str, Record]:
        """Settings of all methods by name, in their order; bimodal integration is the first."""
        own = cast(dict[str, Record], self.methods)
        return {BIMODAL: self.ptq4sam.bimodal, **own} if self.ptq4sam.BIG else own

    def format_of(self, slot: str, roles: frozenset[str]) -> SlotFormat | TensorFormat:
        """The format of a slot with these roles.

        Of all that say something of it the one that names most roles counts; of several the last,
        in the order of the published keys, of methods, and of `slots`.
        """
        formats = self.ptq4sam.slot_formats()
        for name in self.method_settings:
            formats.update(slot_formats(dict(METHODS[name].slots)))
        formats.update(self.slot_formats)
        found = selected(formats, slot, roles)
        base = self.w_qconfig if slot == "weight" else self.a_qconfig
        if slot == STATE and self.compat != STUDY:
            # Sums of products of two activations, which have the bits of both.
            bits = min(2 * base.bit, _MOST_BITS)
            base = replace(base, bit=bits, symmetric=True)
        if found is None:
            return base
        if found.grid != AFFINE:
            return replace(found, bit=found.bit or base.bit)
        given = {key: value for key, value in found.to_dict().items() if value is not None}
        given.pop("grid")
        base_bits, symmetric = given.get("bit", base.bit), given.get("symmetric", base.symmetric)
        # As in `with_bits`; steps of groups of 8 bits with zero points would be no bytes.
        if "ch_axis" in given or not octaves(base_bits, symmetric):
            base = replace(base, group_size=0)
        return TensorFormat.from_dict({**base.to_dict(), **given})

    def with_bits(self, weights: int, activations: int) -> Scheme:
        """The same scheme at other bits; exceptions stay."""
        format_ = self.w_qconfig
        # At more bits than a byte has room for groups of, channels have one scale.
        size = format_.group_size if octaves(weights, format_.symmetric) else 0
        return replace(
            self,
            a_qconfig=replace(self.a_qconfig, bit=activations),
            w_qconfig=replace(format_, bit=weights, group_size=size),
        )

    def with_units(self, units: Mapping[str, int | str]) -> Scheme:
        """The same scheme with these exceptions.

        Raises:
            ConfigError: a level is not possible.
        """
        return self.from_dict({**self.to_dict(), "units": dict(units)})

    def with_steps(self, steps: int) -> Scheme:
        """The same scheme with another number of reconstruction steps a unit.

        A step of Adam moves a parameter by about the learning rate, so that half as many steps need
        twice the rate to come as far; at most a hundred times, as higher rates overshot (on
        vit_nano at 4 bits with 100 steps). A scheme without reconstruction stays as it is.

        Raises:
            ConfigError: not even one step.
        """
        if self.recon is None:
            return self
        factor = min(self.recon.iters / max(1, steps), _HIGHEST_RAISE)
        return self.with_overrides(
            f"recon.iters={steps}",
            f"recon.scale_lr={self.recon.scale_lr * factor:.4g}",
            f"recon.rounding_lr={self.recon.rounding_lr * factor:.4g}",
        )

    @classmethod
    def set_in(cls, mapping: dict[str, Any], key: str, value: object) -> None:
        """Set a field; `methods.pcc.share` is that of a method, however methods are written.

        Raises:
            FieldError: there is no such place, or the scheme does not have that method.
        """
        section, _, rest = key.partition(".")
        name, _, setting = rest.partition(".")
        methods = () if mapping.get(section) is None else mapping[section]
        if section == "methods" and rest and isinstance(methods, (Mapping, list, tuple)):
            every = methods if isinstance(methods, Mapping) else tuple(methods)
            named = {one: {} if own is None else own for one, own in _by_name(every)}
            mapping[section] = named
            if setting and name not in named:
                has = f"it has {', '.join(named)}" if named else "it has none"
                whole = f"methods.{name}={{{setting}: {json.dumps(value, default=str)}}}"
                raise FieldError(
                    key, f"the scheme has no method {name!r}, {has}: give it whole, as {whole}"
                )
        super().set_in(mapping, key, value)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Scheme:
        """Read a scheme from a YAML file.

        Args:
            path: the file, or the name of one that ships, as ptq4sam-l44.

        Raises:
            ConfigError: there is none, it is not YAML, or describes no possible scheme.
        """
        return cls.from_dict(read_yaml(find(path, SCHEMES, "scheme"), "scheme file"), path)

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back to an equal scheme."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
