"""Schemes: the frozen, validated description of a quantization.

A scheme is read from YAML with the keys and values of the published PTQ4SAM configurations
(exp/config44.yaml) and some of our own, marked below. Only grids and methods by name need torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from ptq4sam.quantization.published import BIMODAL, Methods
from ptq4sam.quantization.registry import METHODS, OBSERVERS, QUANTIZERS
from ptq4sam.quantization.slots import (
    ADAROUND,
    AFFINE,
    PER_GROUP,
    STATE,
    SlotFormat,
    octaves,
    selected,
    slot_formats,
    with_ch_axis,
)
from ptq4sam.records import FieldError, Record, read_yaml
from ptq4sam.shipped import SCHEMES, find

PER_TENSOR_OBSERVER_NAMES = (
    "AvgMinMaxObserver",
    "AvgMSEObserver",
    "AvgMSEFastObserver",
)
LEARNED_SCALE_QUANTIZER_NAMES = ("LSQFakeQuantize", "LSQPlusFakeQuantize")

FLOAT: Literal["float"] = "float"
"""Instead of bits: a unit that stays as it is."""

STUDY: Literal["study"] = "study"
SIMULATIONS = {
    "published": "is not on its grid",
    STUDY: "quantizes results between float operations, as no device does",
}
"""What of a scheme's `compat` keeps a model from being saved, exported or deployed."""

_BOTH_BITS = re.compile(r"w(\d+)a(\d+)")

_MOST_BITS = 16
_HIGHEST_RAISE = 100.0
"""Of learning rates, when a scheme is run with fewer steps."""


@dataclass(frozen=True)
class TensorFormat(Record):
    """Number format of the weights or of the activations.

    Attributes:
        quantizer: a name in QUANTIZERS.
        observer: a name in OBSERVERS.
        bit: bits, 2 to 16.
        symmetric: zero point 0 on a signed grid, else an unsigned grid with a zero point.
        ch_axis: 0 for a scale per output channel, -1 for one per tensor. Files may say
            `granularity: per channel` or `per tensor` instead, which goes before.
        group_size: ours; with `granularity: per group`, input channels of a weight that share a
            scale, one power of two of the channel's step; 0 for all.
    """

    quantizer: str
    observer: str
    bit: int
    symmetric: bool = False
    ch_axis: int = -1
    group_size: int = 0

    @classmethod
    def _renamed(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        if mapping.get("granularity") == PER_GROUP and not mapping.get("group_size"):
            raise FieldError("group_size", f"missing; {PER_GROUP} needs one, as 32")
        return with_ch_axis(mapping)

    def to_dict(self) -> dict[str, Any]:
        """Without groups as files always were."""
        found = super().to_dict()
        return found if self.group_size else {k: v for k, v in found.items() if k != "group_size"}

    def _validate_groups(self) -> None:
        self._require(self.group_size >= 0, "group_size", "1 or more, or 0 for no groups")
        if not self.group_size:
            return
        self._require(self.ch_axis == 0, "group_size", f"it with granularity: {PER_GROUP} only")
        if self.quantizer in LEARNED_SCALE_QUANTIZER_NAMES:
            raise FieldError(
                "quantizer",
                f"{self.quantizer} learns scales, those of groups are powers of two of one step: "
                f"use FixedFakeQuantize or {ADAROUND}",
            )

    def _validate(self) -> None:
        QUANTIZERS.require(self.quantizer, "quantizer")
        OBSERVERS.require(self.observer, "observer")
        self._require(2 <= self.bit <= 16, "bit", "2 to 16")
        self._validate_groups()
        self._require(self.ch_axis in (-1, 0), "ch_axis", "-1 (per tensor), 0 (per channel)")
        if self.ch_axis == 0 and _is_per_tensor_only(self.observer):
            channelwise = [name for name in OBSERVERS.names if not _is_per_tensor_only(name)]
            raise FieldError(
                "observer",
                f"{self.observer} works per tensor only: set ch_axis to -1, "
                f"or use one of {', '.join(channelwise)}",
            )


@dataclass(frozen=True)
class Reconstruction(Record):
    """How units are reconstructed (QDrop, Wei et al. 2022; BRECQ, Li et al. 2021; AdaRound).

    Attributes:
        batch_size: pictures a step, drawn with replacement; in the decoder groups of up to 100
            boxes of one picture.
        scale_lr: Adam's first learning rate of the activation scales, annealed to 0 by a cosine.
        warm_up: share of the steps without rounding regularizer, in [0, 1).
        weight: factor of the rounding regularizer.
        iters: steps a unit.
        b_range: exponent of the regularizer at the end of the warm-up and at the last step.
        keep_gpu: keep captured activations in a GPU's memory while there is room; else in the
            host's. No result depends on it.
        round_mode: "learned_hard_sigmoid" (AdaRound's rectified sigmoid).
        drop_prob: probability that an element stays float, in activations and unit inputs; 0 is
            off. (Published files only have 0.5.)
        rounding_lr: ours; Adam's learning rate of the rounding variables.
        learn_rounding: ours; learn the rounding of the weights.
        learn_scale: ours; learn the scales of the activations, and the zero points of LSQ+.
        granularity: ours; reconstruct whole attentions, MLPs and the like ("unit", as BRECQ and
            QDrop), one layer after another ("layer", as AdaRound), or units with both cross
            attentions of a decoder's block and the MLP between them as one ("joint", as CAR-SAM).
        loss: ours; what a unit learns by: its own answer ("output"), or what masks are made of
            ("prompt-aware", as SAQ-SAM): the image behind the decoder, of units of the encoder, and
            image and tokens behind them, of joint units, which it needs.
        patience: ours; steps without a lower loss after which the rest of the schedule passes
            within as many steps; 0 makes all steps.
        precision: ours; of the matrix products of a step: "float32", "bfloat16" (about half
            the time of a step on a CPU that has it), "tf32" (GPUs only). What is learned, the
            quantizers and all measured errors stay float32.
        cuda_graphs: ours; let a GPU repeat steps of one shape by itself, without being told each
            operation again. No result depends on it.
        weights_only: ours, and what --brecq sets; activations stay float while reconstructing, so
            that learn_scale becomes false and drop_prob 0.
    """

    batch_size: int = 1
    scale_lr: float = 4e-5
    warm_up: float = 0.2
    weight: float = 0.01
    iters: int = 20000
    b_range: tuple[float, float] = (20.0, 2.0)
    keep_gpu: bool = True
    round_mode: Literal["learned_hard_sigmoid"] = "learned_hard_sigmoid"
    drop_prob: float = 0.5
    rounding_lr: float = 1e-3
    learn_rounding: bool = True
    learn_scale: bool = True
    granularity: Literal["unit", "layer", "joint"] = "unit"
    loss: Literal["output", "prompt-aware"] = "output"
    patience: int = 0
    precision: Literal["float32", "bfloat16", "tf32"] = "float32"
    cuda_graphs: bool = True
    weights_only: bool = False

    def _validate(self) -> None:
        self._require(self.batch_size >= 1, "batch_size", "1 or more")
        self._require(self.scale_lr > 0, "scale_lr", "more than 0")
        self._require(self.rounding_lr > 0, "rounding_lr", "more than 0")
        self._require(0 <= self.warm_up < 1, "warm_up", "0 to below 1")
        self._require(self.weight >= 0, "weight", "0 or more")
        self._require(self.iters >= 1, "iters", "1 or more")
        self._require(self.patience >= 0, "patience", "0 or more")
        self._require(
            self.b_range[0] >= self.b_range[1] > 0, "b_range", "[start, end], start >= end > 0"
        )
        self._require(0 <= self.drop_prob < 1, "drop_prob", "0 to below 1")
        if self.loss == "prompt-aware" and (self.granularity, self.batch_size) != ("joint", 1):
            raise FieldError(
                "loss",
                f"prompt-aware given with granularity {self.granularity} and batch_size "
                f"{self.batch_size}: it needs granularity joint and batch_size 1",
            )
        if self.weights_only:
            object.__setattr__(self, "learn_scale", False)
            object.__setattr__(self, "drop_prob", 0.0)
        if not (self.learn_rounding or self.learn_scale):
            raise FieldError("learn_rounding", "nothing to learn: no rounding and no scale")


_LEVELS = "2 to 16, both apart as w4a8, or float"


def bits_of_level(level: int | str) -> tuple[int, int] | None:
    """Bits of the weights and of the activations of a unit; None for one that stays float.

    Args:
        level: what a scheme's `units` says of it.

    Raises:
        FieldError: it is no level.
    """
    if isinstance(level, int):
        return level, level
    both = _BOTH_BITS.fullmatch(level)
    if both is not None:
        return int(both[1]), int(both[2])
    if level != FLOAT:
        raise FieldError("", f"{level!r} given, allowed: {_LEVELS}")
    return None


def described_level(level: int | str) -> str:
    """What a scheme's `units` says of a unit, for people."""
    if isinstance(level, int):
        return f"at {level} bits"
    return level if level == FLOAT else f"at {level.upper()}"


def _with_settings(methods: Mapping[str, object] | tuple[str, ...]) -> dict[str, Record]:
    """Methods by name with records of their settings, from what a scheme says."""
    given = methods if isinstance(methods, Mapping) else dict.fromkeys(methods)
    found: dict[str, Record] = {}
    for name, settings in given.items():
        METHODS.require(name, "methods")
        kind = METHODS[name].settings_type
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
        a_qconfig: format of the activations, per tensor.
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
        methods: ours; names in METHODS with their settings, or a list of names; each may change the
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
    methods: dict[str, object] | tuple[str, ...] = field(default_factory=dict)
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
                raise FieldError(f"units.{name}", f"{level} given, allowed: {_LEVELS}")
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
        if "ch_axis" in given:
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


def _is_per_tensor_only(observer: str) -> bool:
    if observer in PER_TENSOR_OBSERVER_NAMES:
        return True
    kind = OBSERVERS.get(observer)
    return kind is not None and (kind.per_tensor_only or kind.averages)
