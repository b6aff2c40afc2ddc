"""What quantized operators share: they list their slots and products, and registries know them.

Whoever looks at a model (audit, switches, cost, files, exports) walks over slots and products; only
this folder knows which operators there are. To add one: a float form where torch has none, a
subclass of `QuantizedOperator` registered by `quantizes`, and its work by `work`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ptq4sam.operators.arithmetic import Arithmetic, Operator
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode, Quantizer

WEIGHT, INPUT = "weight", "input"
QUERY, KEY, VALUE, SOFTMAX, STATE = "query", "key", "value", "softmax", "state"

MakeQuantizer = Callable[[str], Quantizer]
"""Makes the quantizer of a slot, by the slot's name."""


@dataclass(frozen=True)
class Product:
    """A product of what two slots hold.

    Attributes:
        name: below the operator's path; empty for the only one.
        module: that makes it; what multiplies is seen while it runs.
        first: slot.
        second: slot.
        factor: what values of the first, but not their steps, are multiplied with before.
    """

    name: str
    module: nn.Module
    first: str
    second: str
    factor: float = 1.0


class QuantizedOperator(Operator):
    """An operator whose operands pass quantizers, made of a float one.

    A slot's quantizer is the child `SLOT_quantizer`.
    """

    slot_names: ClassVar[tuple[str, ...]]
    wide_slots: ClassVar[frozenset[str]] = frozenset()
    """Those that may have up to 16 bits on a device, which cuts them into digits."""
    kind: ClassVar[str] = ""
    """A role of all its slots, beside those that a model's description gives them."""

    @classmethod
    def of(cls, source: Any, make: MakeQuantizer) -> QuantizedOperator:
        """The quantized form of a float operator, with its parameters.

        Raises:
            ConfigError: it has none.
        """
        build: Callable[..., QuantizedOperator] = cls
        return build(source, *map(make, cls.slot_names))

    def quantizer(self, slot: str) -> Quantizer:
        """The quantizer of a slot."""
        return cast(Quantizer, getattr(self, f"{slot}_quantizer"))

    def slots(self) -> dict[str, Quantizer]:
        """All quantizers by slot."""
        return {slot: self.quantizer(slot) for slot in self.slot_names}

    def products(self) -> tuple[Product, ...]:
        """What it multiplies."""
        raise NotImplementedError

    def _computes_whole(self) -> bool:
        """Whether products of what the slots give are computed on whole numbers."""
        learns = self.arithmetic is Arithmetic.LEARNING
        return not learns and all(self.quantizer(slot).is_whole for slot in self.slot_names)


class QuantizedLayer(QuantizedOperator):
    """An operator with a weight of its own."""

    slot_names: ClassVar[tuple[str, ...]] = (WEIGHT, INPUT)
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer
    input_quantizer: Quantizer

    def __init__(
        self, source: Any, weight_quantizer: Quantizer, input_quantizer: Quantizer
    ) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        affine = weight_quantizer.as_affine()
        if affine is not None:
            # Whether there are groups is seen before anything is calibrated.
            affine.parameter_shape(source.weight.shape)
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer

    def products(self) -> tuple[Product, ...]:
        """Input times weight."""
        return (Product("", self, INPUT, WEIGHT),)

    def by_output(self, output: Tensor) -> Tensor:
        """What it gives [..., outputs], with the outputs of its weight's rows first."""
        return output.movedim(-1, 0)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What a forward on whole numbers depends on but for its input."""
        return (self.weight, *self.weight_quantizer.tensors, *self.input_quantizer.tensors)


def step_of_sums(layer: QuantizedLayer) -> Tensor:
    """What a layer's sum of 1 is worth: input scale * weight scale, [channels] or []."""
    return layer.input_quantizer.step * layer.weight_quantizer.step


class PortableOperator(Operator):
    """A float operator between quantizers that computes what every runtime computes.

    While something is learned, and where costs are counted, it is torch's own.
    """

    def _is_portable(self, x: Tensor) -> bool:
        learns = self.arithmetic is Arithmetic.LEARNING
        return x.dtype == torch.float32 and not (learns or x.is_meta)


class _Portable(Protocol):
    @classmethod
    def of(cls, source: Any) -> nn.Module: ...


@dataclass(frozen=True)
class Work:
    """Multiplications of one product in a forward pass.

    Attributes:
        name: below the operator's path.
        macs: multiply-accumulates.
        operands: slots; of what is no slot of the operator 32 bits are read.
        read: elements of the activations that it reads, by slot.
        windows: it is one of many small attentions.
    """

    name: str
    macs: int
    operands: tuple[str, str]
    read: tuple[tuple[str, int], ...]
    windows: bool = False


Worker = Callable[[Any, tuple[Any, ...], Tensor], Iterable[Work]]
"""From an operator, its inputs and its output to what it multiplied."""

QUANTIZED: dict[type[nn.Module], type[QuantizedOperator]] = {}
PORTABLE: dict[type[nn.Module], type[_Portable]] = {}
WORK: dict[type[nn.Module], Worker] = {}
"""Quantized and portable form, and work, by the exact type of an operator."""


def kinds() -> frozenset[str]:
    """Roles that slots have by the kind of their operator."""
    return frozenset(form.kind for form in QUANTIZED.values() if form.kind)


Q = TypeVar("Q", bound=type[QuantizedOperator])
F = TypeVar("F", bound=type[_Portable])
W = TypeVar("W", bound=Worker)


def quantizes(kind: type[nn.Module]) -> Callable[[Q], Q]:
    """Decorator: the quantized form of a float operator."""

    def decorate(quantized: Q) -> Q:
        QUANTIZED[kind] = quantized
        return quantized

    return decorate


def portable_form(kind: type[nn.Module]) -> Callable[[F], F]:
    """Decorator: the portable form of a float operator."""

    def decorate(portable: F) -> F:
        PORTABLE[kind] = portable
        return portable

    return decorate


def work(*kinds: type[nn.Module]) -> Callable[[W], W]:
    """Decorator: what operators of these types multiply."""

    def decorate(worker: W) -> W:
        WORK.update(dict.fromkeys(kinds, worker))
        return worker

    return decorate


def is_portable(module: nn.Module) -> bool:
    """Whether it is the portable form of something."""
    kind: type = type(module)
    return kind in PORTABLE.values()


def form_of(module: nn.Module) -> type[QuantizedOperator] | None:
    """The quantized form that a module is, or that it has."""
    return type(module) if isinstance(module, QuantizedOperator) else QUANTIZED.get(type(module))


def as_operator(module: nn.Module) -> QuantizedOperator | None:
    """The same module, where it is a quantized operator."""
    return module if isinstance(module, QuantizedOperator) else None


def as_layer(module: nn.Module) -> QuantizedLayer | None:
    """The same module, where it is a quantized operator with a weight."""
    return module if isinstance(module, QuantizedLayer) else None


def quantized_operators(module: nn.Module) -> list[tuple[str, QuantizedOperator]]:
    """Every quantized operator below `module` with its path, in registration order."""
    return [
        (name, operator)
        for name, operator in module.named_modules()
        if isinstance(operator, QuantizedOperator)
    ]


def quantized_layers(module: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """Those of them with weights."""
    return [
        (name, operator)
        for name, operator in quantized_operators(module)
        if isinstance(operator, QuantizedLayer)
    ]


def weight_quantizers(module: nn.Module) -> list[Quantizer]:
    """The quantizers of weights below `module`."""
    return [layer.weight_quantizer for _, layer in quantized_layers(module)]


def activation_slots(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer of an activation below `module` with its path."""
    for name, operator in quantized_operators(module):
        for slot, quantizer in operator.slots().items():
            if slot != WEIGHT:
                yield f"{name}.{slot}_quantizer".lstrip("."), quantizer


@torch.no_grad()
def observe_weights(module: nn.Module, progress: Progress = silent) -> None:
    """Set the grid of every weight from the weight itself."""
    for _, layer in progress(quantized_layers(module), "observing weights"):
        with quantizer_mode(layer.weight_quantizer, Mode.OBSERVE):
            layer.weight_quantizer(layer.weight)


@torch.no_grad()
def put_weights_on_grid(module: nn.Module) -> None:
    """Replace every weight by its quantized value, so that the file holds what is computed."""
    for _, layer in quantized_layers(module):
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
