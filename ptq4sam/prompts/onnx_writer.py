"""Writing an ONNX file without the onnx package: its protocol buffers, as far as needed here.

Field numbers are those of onnx.proto (ONNX IR specification); the encoding is that of Protocol
Buffers: a message is a list of fields, each a tag, which holds number and wire type, and a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq4sam.files import replacing

Chunks = list[bytes]
"""An encoded message in pieces, so that large tensors are not copied from one into the next."""

Attribute = int | str | list[int]

_OPSET = 11
_IR_VERSION = 6
_ELEMENT_TYPES = {"float32": 1, "int64": 7}
_VARINT, _BYTES = 0, 2


class OnnxGraph:
    """Collects the nodes of a graph in the order of their execution.

    Args:
        name: of the graph.
        producer: of the file.
    """

    def __init__(self, name: str, producer: str = "ptq4sam") -> None:
        self._name, self._producer = name, producer
        self._nodes: list[Chunks] = []
        self._constants: dict[str, Chunks] = {}

    def constant(self, name: str, value: NDArray[np.float32] | NDArray[np.int64]) -> str:
        """Add a constant tensor; returns its name."""
        little_endian = value.astype(value.dtype.newbyteorder("<"), copy=False)
        self._constants[name] = [
            *(_integer(1, side) for side in value.shape),
            _integer(2, _ELEMENT_TYPES[value.dtype.name]),
            *_text(8, name),
            *_message(9, [little_endian.tobytes()]),
        ]
        return name

    def integers(self, *values: int) -> str:
        """Add a constant vector of integers, of which equal ones are kept once."""
        name = "integers_" + "_".join(map(str, values))
        return self.constant(name, np.array(values, np.int64))

    def node(self, kind: str, inputs: Iterable[str], output: str, **attributes: Attribute) -> str:
        """Add a node with one output; returns the output's name."""
        message: Chunks = []
        for name in inputs:
            message += _text(1, name)
        message += _text(2, output) + _text(3, output) + _text(4, kind)
        for name, value in attributes.items():
            message += _message(5, _attribute(name, value))
        self._nodes.append(message)
        return output

    def write(
        self, path: Path, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]
    ) -> None:
        """Write the file, at once or not at all; shapes are those of float32 tensors."""
        graph: Chunks = []
        for node in self._nodes:
            graph += _message(1, node)
        graph += _text(2, self._name)
        for constant in self._constants.values():
            graph += _message(5, constant)
        for number, values in ((11, inputs), (12, outputs)):
            for name, shape in values.items():
                graph += _message(number, _value_info(name, shape))
        model = [
            _integer(1, _IR_VERSION),
            *_text(2, self._producer),
            *_message(7, graph),
            *_message(8, [_integer(2, _OPSET)]),
        ]
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.writelines(model)


def _attribute(name: str, value: Attribute) -> Chunks:
    if isinstance(value, str):
        return [*_text(1, name), *_text(4, value), _integer(20, 3)]
    if isinstance(value, int):
        return [*_text(1, name), _integer(3, value), _integer(20, 2)]
    return [*_text(1, name), *(_integer(8, item) for item in value), _integer(20, 7)]


def _value_info(name: str, shape: tuple[int, ...]) -> Chunks:
    sides: Chunks = []
    for side in shape:
        sides += _message(1, [_integer(1, side)])
    tensor = [_integer(1, _ELEMENT_TYPES["float32"]), *_message(2, sides)]
    return [*_text(1, name), *_message(2, _message(1, tensor))]


def _message(number: int, content: Chunks) -> Chunks:
    return [_tag(number, _BYTES), _varint(sum(map(len, content))), *content]


def _text(number: int, text: str) -> Chunks:
    return _message(number, [text.encode()])


def _integer(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _varint(value)


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; negative numbers as 64 bits in two's complement."""
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
