"""An ONNX graph, built node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.errors import DependencyError, DeployError

if TYPE_CHECKING:
    import onnx

OPSET = 21
"""Operator set: the first one with 4-bit integers; it has LayerNormalization and Gelu too."""
_IR_VERSION = 10
_LARGEST = 2**31 - 2**20
"""Bytes that a protocol buffer, which an ONNX file is, can hold."""

_LARGE = 2**14
"""Numbers from which on half the bytes are worth a node."""


@dataclass(frozen=True)
class Dimension:
    """A size that is only known when the graph runs."""

    name: str


Shape = Sequence[int | Dimension]


def require_onnx() -> Any:
    """The onnx package.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise DependencyError(
            "writing ONNX files needs the onnx package: pip install 'ptq4sam[onnx]'"
        ) from error
    return onnx


class Graph:
    """Collects nodes in the order of their execution.

    Every node has one output, which bears the node's name; names are paths in the SAM, so that a
    reader finds the module.

    Args:
        name: of the graph.
        dialect: how it is written.

    Attributes:
        path: of the module that is being written.
        names_of_tensors: paths of parameters and buffers, by their identity.
        inexact: paths of quantizers whose codes may be others than in the simulation.
        quantizers: how many there are.
    """

    def __init__(self, name: str, dialect: Dialect) -> None:
        self._onnx = require_onnx()
        self.dialect, self.path = dialect, name
        self.names_of_tensors: dict[int, str] = {}
        self.inexact: list[str] = []
        self.quantizers = 0
        self._tensors: dict[int, tuple[Tensor, str]] = {}
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._names: dict[str, int] = {}

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Add an input; returns its name."""
        self._inputs.append(self._info(self._unique(name), dtype, shape))
        return name

    def output(self, name: str, source: str, dtype: type[np.generic], shape: Shape) -> None:
        """Make a tensor of the graph an output under a name of its own."""
        self.node("Identity", [source], name)
        self._outputs.append(self._info(name, dtype, shape))

    @property
    def portable(self) -> bool:
        """Whether what lies between products of codes is computed as in the simulation."""
        return self.dialect.between == "portable"

    @property
    def multiplies_steps(self) -> bool:
        """Whether products are of whole steps; else of what these are worth."""
        return self.dialect.products == "steps"

    @property
    def exact(self) -> bool:
        """Whether there are codes, and all are the simulation's in every runtime."""
        return self.quantizers > 0 and not self.inexact

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant tensor; returns its name."""
        name = self._unique(name)
        self._constants[name] = self._onnx.numpy_helper.from_array(
            np.asarray(value, order="C"), name
        )
        return name

    def parameter(self, name: str, value: NDArray[np.float32]) -> str:
        """Add a float32 constant, held in float16 where it is large and every value is one."""
        if value.size < _LARGE:
            return self.constant(name, value)
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), value):
            return self.constant(name, value)
        return self.cast(self.constant(name, half), np.float32, f"{name}.float32")

    def quantized(self, path: str, exact: bool) -> None:
        """Note a quantizer, and whether its codes are the simulation's."""
        self.quantizers += 1
        if not exact:
            self.inexact.append(path)

    def tensor(self, value: Tensor, name: str) -> str:
        """A tensor that a forward brings with it, added once, under its own path if it has one."""
        _, known = self._tensors.get(id(value), (value, ""))
        if not known:
            array = value.detach().cpu().float().numpy()
            known = self.parameter(self.names_of_tensors.get(id(value), name), array)
            # Kept, so that its identity is no other's.
            self._tensors[id(value)] = value, known
        return known

    def nibbles(self, name: str, codes: NDArray[np.integer[Any]]) -> str:
        """Add a constant of codes 0 to 15, two in a byte; returns the name of its int32 form."""
        uint4 = self._onnx.helper.tensor_dtype_to_np_dtype(self._onnx.TensorProto.UINT4)
        return self.cast(self.constant(name, codes.astype(uint4)), np.int32, f"{name}.int32")

    def number(self, value: float, dtype: type[np.floating[Any]] = np.float32) -> str:
        """A constant of no dimensions; equal ones are kept once."""
        return self.shared(f"number.{np.dtype(dtype)}.{value!r}", np.array(value, dtype))

    def integers(self, *values: int) -> str:
        """A vector of int64; equal ones are kept once."""
        name = "integers." + ".".join(map(str, values))
        return self.shared(name, np.array(values, np.int64))

    def shared(self, name: str, value: NDArray[Any]) -> str:
        """A constant under this name, added once."""
        return name if name in self._constants else self.constant(name, value)

    def node(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        name = self._unique(name)
        node = self._onnx.helper.make_node(kind, list(inputs), [name], name, **attributes)
        self._nodes.append(node)
        return name

    def split(self, x: str, parts: int, axis: int, name: str) -> list[str]:
        """Cut a tensor into equal parts along an axis."""
        names = [self._unique(f"{name}.{part}") for part in range(parts)]
        self._nodes.append(
            self._onnx.helper.make_node(
                "Split", [x], names, self._unique(name), axis=axis, num_outputs=parts
            )
        )
        return names

    def reshape(self, x: str, shape: Sequence[int], name: str) -> str:
        """Reshape; 0 keeps the size at its place."""
        return self.node("Reshape", [x, self.integers(*shape)], name)

    def transpose(self, x: str, order: Sequence[int], name: str) -> str:
        """Permute the axes."""
        return self.node("Transpose", [x], name, perm=list(order))

    def slice(self, x: str, first: int, last: int, axis: int, name: str) -> str:
        """Elements first to last (excluded) of an axis."""
        bounds = [self.integers(first), self.integers(last), self.integers(axis)]
        return self.node("Slice", [x, *bounds], name)

    def cast(self, x: str, dtype: type[np.generic], name: str) -> str:
        """Convert to another type of numbers."""
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [x], name, to=kind)

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """Check the graph and write it.

        Raises:
            DeployError: it is too large for one file.
        """
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._constants.values())
        )
        model = helper.make_model(
            graph,
            producer_name="ptq4sam",
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
        )
        helper.set_model_props(model, metadata)
        if model.ByteSize() > _LARGEST:
            raise DeployError(
                f"{self._name} takes {model.ByteSize() / 2**30:.1f} GiB, an ONNX file holds 2: "
                "quantize the model, or export a smaller one"
            )
        self._onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())

    def _unique(self, name: str) -> str:
        count, found = self._names.get(name, 0), name
        # A number behind a name may be the name of something else.
        while count and (found := f"{name}.{count}") in self._names:
            count += 1
        self._names[name] = count + 1
        self._names.setdefault(found, 1)
        return found

    def _info(self, name: str, dtype: type[np.generic], shape: Shape) -> onnx.ValueInfoProto:
        helper = self._onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        sizes = [size.name if isinstance(size, Dimension) else size for size in shape]
        info: onnx.ValueInfoProto = helper.make_tensor_value_info(name, kind, sizes)
        return info
