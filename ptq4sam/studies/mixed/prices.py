"""What each unit takes at each number of bits, and budgets as people write them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptq4sam.deploy.cost import Cost, count, meta_sam, storage
from ptq4sam.deploy.operations import operations
from ptq4sam.errors import ConfigError
from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.quantization.modes import has_quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sizes import parse_bytes

BYTES, BIT_OPERATIONS = "bytes of weights", "bit operations"
"""What is limited, as `ptq4sam cost` counts it, of one picture with one box."""

Bits = tuple[int, int]
"""Of weights and of activations."""

_POWERS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Prices:
    """Bytes and bit operations of a model by part.

    Attributes:
        fixed: of all that is not in a quantized unit.
        units: of each quantized unit at each pair of bits.
    """

    fixed: tuple[int, int]
    units: dict[str, dict[Bits, tuple[int, int]]]

    def total(self, chosen: dict[str, Bits]) -> tuple[int, int]:
        """Of the model with these bits."""
        parts = [self.units[unit][bits] for unit, bits in chosen.items()]
        return (
            self.fixed[0] + sum(part[0] for part in parts),
            self.fixed[1] + sum(part[1] for part in parts),
        )


def prices_of(
    model: str,
    scheme: Scheme,
    quantize_encoder: bool,
    choices: Sequence[Bits],
    image_size: int | None = None,
) -> Prices:
    """Count a model's units at all pairs of bits.

    Args:
        model: name of the SAM.
        scheme: a scheme without exceptions.
        quantize_encoder: the encoder's units are among them.
        choices: pairs of bits.
        image_size: side of the input in pixels; None for the model's own.
    """
    units: dict[str, dict[Bits, tuple[int, int]]] = {}
    for bits in choices:
        found = _by_unit(model, scheme.with_bits(*bits), quantize_encoder, image_size)
        for name, price in found.items():
            if name:
                units.setdefault(name, {})[bits] = price
    # What is in no unit, as the upscaling, has the scheme's own bits whatever is chosen.
    fixed = _by_unit(model, scheme, quantize_encoder, image_size)[""]
    return Prices(fixed, units)


def _by_unit(
    model: str, scheme: Scheme, quantize_encoder: bool, image_size: int | None
) -> dict[str, tuple[int, int]]:
    """Bytes and bit operations of each unit that is quantized; of all else under no name."""
    sam = meta_sam(model, scheme, quantize_encoder, image_size)
    if not isinstance(sam, QuantizedSam):
        raise TypeError("a scheme makes a quantized model")
    names = [name for name, unit in model_units(sam) if has_quantizers(unit)]
    found = {name: [0, 0] for name in ["", *names]}
    for name, _, size in storage(sam, scheme.float_weights == "float16"):
        found[_unit(name, names)][0] += size
    for operation in operations(sam):
        first, second = operation.bits
        found[_unit(operation.name, names)][1] += operation.macs * first * second
    return {name: (size, work) for name, (size, work) in found.items()}


def _unit(name: str, units: Sequence[str]) -> str:
    """The unit that a path belongs to; empty for none."""
    return next((unit for unit in units if name.startswith(f"{unit}.")), "")


@dataclass(frozen=True)
class Budget:
    """What a model may take: bytes of its weights and bit operations of a picture; None: any."""

    bytes: int | None = None
    bit_operations: int | None = None

    @property
    def limits(self) -> tuple[tuple[str, int, int], ...]:
        """Name, place in prices, and limit of each that is limited."""
        given = ((BYTES, 0, self.bytes), (BIT_OPERATIONS, 1, self.bit_operations))
        return tuple((name, place, limit) for name, place, limit in given if limit is not None)


def read_budget(
    texts: Sequence[str],
    model: str,
    scheme: Scheme,
    quantize_encoder: bool,
    image_size: int | None = None,
) -> Budget:
    """A budget as people write it; of several limits on one thing the lowest holds.

    Args:
        texts: each a share of the float32 weights ("15%"), their size ("2MiB"), bit operations
            ("60GBOP"), or both as of a uniform scheme ("w4a4").
        model: name of the SAM.
        scheme: the scheme without its bits.
        quantize_encoder: quantize the encoder too.
        image_size: side of the input in pixels; None for the model's own.

    Raises:
        ConfigError: a text is none of these.
    """
    counted = functools.partial(count, model, image_size=image_size)
    found = [_read(text.strip(), counted, scheme, quantize_encoder) for text in texts]
    values = {
        field.name: [v for v in (getattr(one, field.name) for one in found) if v is not None]
        for field in dataclasses.fields(Budget)
    }
    return Budget(**{name: min(those) if those else None for name, those in values.items()})


def _read(
    text: str, counted: Callable[..., Cost], scheme: Scheme, quantize_encoder: bool
) -> Budget:
    if uniform := re.fullmatch(r"w(\d+)a(\d+)", text, re.IGNORECASE):
        at_bits = scheme.with_bits(int(uniform[1]), int(uniform[2]))
        total = counted(at_bits, quantize_encoder=quantize_encoder).total
        return Budget(total.weight_bytes, total.bit_operations)
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        float_bytes = counted().total.float_weight_bytes
        return Budget(bytes=int(float_bytes * float(share[1]) / 100))
    if work := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)BOPs?", text, re.IGNORECASE):
        return Budget(bit_operations=int(float(work[1]) * _POWERS[work[2].upper()]))
    try:
        return Budget(bytes=parse_bytes(text))
    except ConfigError:
        raise ConfigError(
            f"asked for a budget of {text!r}: write a share of the float weights (15%), their size "
            "(2MiB), bit operations (60GBOP), or a uniform scheme that takes as much (w4a4)"
        ) from None
