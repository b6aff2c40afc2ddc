"""What a SAM computes and holds, part by part, at the bits of a scheme.

An operation of an a-bit and a w-bit operand costs a * w bit operations (as of hardware whose
multipliers grow with both), or max(a, w) / 32 of a float operation (as of hardware that is limited
by the bits it moves); published tables use both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ptq4sam.deploy.operations import FLOAT_BITS, Operation, operations
from ptq4sam.deploy.packing import packed_size
from ptq4sam.families import build_sam
from ptq4sam.model.float_weights import float_weights
from ptq4sam.model.insertion import insert_quantizers
from ptq4sam.operators.base import QuantizedLayer, quantized_layers
from ptq4sam.quantization.groups import GROUPED
from ptq4sam.quantization.scheme import STUDY, Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone

_HALF_BITS = 16
_CHANNEL_BYTES = 5
"""Of a weight's channel: a float32 scale and a zero point, which is a code of up to 8 bits."""
_GROUP_BYTES = 2
"""Of a group of its input channels: a zero point, and how often the channel's step is doubled."""


@dataclass(frozen=True)
class PartCost:
    """One part of a model.

    Attributes:
        name: what it is.
        parameters: values that it holds.
        weight_bytes: that these take.
        float_weight_bytes: that they take in float32.
        macs: multiply-accumulates.
        bit_operations: sum of multiply-accumulates times the bits of both operands.
        float_operations: multiply-accumulates, each weighted by max(bits) / 32.
        activation_bytes: of all activations that its operations read.
        float_activation_bytes: the same in float32.
    """

    name: str
    parameters: int = 0
    weight_bytes: int = 0
    float_weight_bytes: int = 0
    macs: int = 0
    bit_operations: int = 0
    float_operations: float = 0.0
    activation_bytes: float = 0.0
    float_activation_bytes: int = 0

    def plus(self, other: PartCost) -> PartCost:
        """Both together, under this one's name."""
        mine, theirs = vars(self), vars(other)
        return PartCost(**{k: v if k == "name" else v + theirs[k] for k, v in mine.items()})


@dataclass(frozen=True)
class Cost:
    """A model by part, in the order of execution.

    Attributes:
        model: name of the SAM.
        boxes: prompts that are decoded for one picture.
        parts: all of it.
    """

    model: str
    boxes: int
    parts: tuple[PartCost, ...]

    @property
    def total(self) -> PartCost:
        """All parts together."""
        total = PartCost("total")
        for part in self.parts:
            total = total.plus(part)
        return total

    @property
    def storage_ratio(self) -> float:
        """Bytes of the float32 weights against those of the quantized ones."""
        return self.total.float_weight_bytes / self.total.weight_bytes

    @property
    def operations_ratio(self) -> float:
        """Float operations against weighted ones."""
        return self.total.macs / self.total.float_operations

    @property
    def layers_ratio(self) -> float:
        """As `operations_ratio`, but with the products of attentions at 32 bits.

        PTQ4SAM's 3.9 times for SAM-H at 6 bits comes out so.
        """
        products = [part for part in self.parts if "attention" in part.name]
        dearer = sum(part.macs - part.float_operations for part in products)
        return self.total.macs / (self.total.float_operations + dearer)

    @property
    def bit_operations_ratio(self) -> float:
        """Bit operations in float32 against those at the bits that there are."""
        return self.total.macs * FLOAT_BITS**2 / self.total.bit_operations


def count(
    name: str,
    scheme: Scheme | None = None,
    *,
    quantize_encoder: bool = True,
    boxes: int = 1,
    image_size: int | None = None,
) -> Cost:
    """Count a SAM for one picture.

    Args:
        name: of the SAM, a key of `families.VARIANTS`.
        scheme: the quantization; None for the float model.
        quantize_encoder: quantize the image encoder too.
        boxes: box prompts on the picture.
        image_size: side of the input in pixels; None for the model's own.

    Raises:
        ConfigError: the name is unknown, the size impossible, or the scheme makes an exception for
            a unit that is not.
    """
    sam = meta_sam(name, scheme, quantize_encoder, image_size)
    parts: dict[str, PartCost] = {}

    def add(part: PartCost) -> None:
        parts[part.name] = parts.get(part.name, PartCost(part.name)).plus(part)

    for operation in operations(sam, boxes):
        add(_cost(operation))
    half = scheme is not None and scheme.float_weights == "float16"
    for path, values, size in storage(sam, half):
        add(PartCost(sam.description.part_of(path), values, size, FLOAT_BITS // 8 * values))
    return Cost(name, boxes, tuple(parts.values()))


def meta_sam(
    name: str,
    scheme: Scheme | None = None,
    quantize_encoder: bool = True,
    image_size: int | None = None,
) -> Sam:
    """A SAM without values, float or with quantizers; arguments as for `count`."""
    with shapes_alone():
        sam = build_sam(name, image_size, folded=scheme is None or scheme.compat != STUDY)
    # On its device, to which quantizers are moved: made there, each would take ten times as long.
    return sam if scheme is None else insert_quantizers(sam, scheme, quantize_encoder)


def _cost(operation: Operation) -> PartCost:
    first, second = operation.bits
    return PartCost(
        operation.part,
        macs=operation.macs,
        bit_operations=operation.macs * first * second,
        float_operations=operation.macs * max(first, second) / FLOAT_BITS,
        activation_bytes=sum(elements * bits / 8 for elements, bits in operation.read),
        float_activation_bytes=sum(4 * elements for elements, _ in operation.read),
    )


def _bytes_of_scales(layer: QuantizedLayer) -> int:
    """Of a weight's scales and zero points in a packed file."""
    affine = layer.weight_quantizer.as_affine()
    shape = () if affine is None else affine.parameter_shape(layer.weight.shape)
    if len(shape) < GROUPED:
        return math.prod(shape) * _CHANNEL_BYTES
    return 4 * shape[0] + _GROUP_BYTES * math.prod(shape)


def storage(sam: Sam, half: bool = False) -> Iterator[tuple[str, int, int]]:
    """Name, number of values and bytes of every parameter.

    A quantized weight takes its packed codes, and a scale and zero point for each of its channels.

    Args:
        sam: a model, on the meta device or not.
        half: what no quantizer touches takes half precision.
    """
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(sam)}
    halved = float_weights(sam) if half else {}
    for name, tensor in sam.state_dict().items():
        if "_quantizer." in name:
            continue
        values = tensor.numel()
        size = values * (_HALF_BITS if name in halved else FLOAT_BITS) // 8
        if name in layers:
            layer = layers[name]
            size = packed_size(values, layer.weight_quantizer.grid.bits)
            size += _bytes_of_scales(layer)
        yield name, values, size
