"""YOLOX from a .pth file to ONNX, laid out as its authors' own export; needs nothing but torch.

PyTorch's exporters need the onnx package, so the network is traced with torch.fx and its dozen
operations are written by `onnx_writer`.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ptq4sam.prompts.onnx_writer import OnnxGraph
from ptq4sam.prompts.yolox_network import STRIDES, YoloxNetwork, folded
from ptq4sam.prompts.yolox_weights import load_yolox

_log = logging.getLogger(__name__)

_END = 2**63 - 1


def convert_yolox(source: Path, target: Path, side: int | None = None) -> None:
    """Write the ONNX file of a YOLOX .pth file: input "images", output "output", not decoded.

    Args:
        source: the .pth file; see `load_yolox`.
        target: the ONNX file, which is written at once or not at all.
        side: height and width in pixels of the input, a multiple of 32; None for what the size was
            trained for (nano and tiny 416, else 640).

    Raises:
        CheckpointError: the weights are missing, damaged or not those of a YOLOX.
        ConfigError: the side is not possible.
    """
    network = load_yolox(source, side)
    write_yolox(network, target)
    _log.info("%s written: input [1, 3, %d, %d]", target, network.size.side, network.size.side)


def write_yolox(network: YoloxNetwork, target: Path) -> None:
    """Write a network as an ONNX file for one picture of its size's side."""
    network = folded(network)
    side = network.size.side
    rows = sum((side // stride) ** 2 for stride in STRIDES)
    columns = 5 + network.classes
    traced = fx.symbolic_trace(network)
    graph = OnnxGraph("yolox")
    for node in traced.graph.nodes:
        _Writer(graph, traced, node).write()
    graph.write(target, {"images": (1, 3, side, side)}, {"output": (1, rows, columns)})


class _Writer:
    """Writes one traced operation; its output has the traced node's name."""

    def __init__(self, graph: OnnxGraph, traced: fx.GraphModule, node: fx.Node) -> None:
        self.graph, self.traced, self.node = graph, traced, node

    def write(self) -> None:
        if self.node.op in ("placeholder", "output"):
            return
        kind: Any = self.node.target
        if self.node.op == "call_module":
            kind = type(self.traced.get_submodule(str(kind)))
        _OPERATIONS[kind](self)

    def convolution(self) -> None:
        module = self._module
        prefix = str(self.node.target)
        parameters = [
            self.graph.constant(f"{prefix}.{key}", _array(getattr(module, key)))
            for key in ("weight", "bias")
        ]
        self._emit(
            "Conv",
            [self._input, *parameters],
            dilations=list(module.dilation),
            group=module.groups,
            kernel_shape=list(module.kernel_size),
            pads=[*module.padding, *module.padding],
            strides=list(module.stride),
        )

    def silu(self) -> None:
        gate = self._emit("Sigmoid", [self._input], f"{self.node.name}_gate")
        self._emit("Mul", [self._input, gate])

    def pool(self) -> None:
        side, padding = self._module.kernel_size, self._module.padding
        self._emit("MaxPool", [self._input], kernel_shape=[side] * 2, pads=[padding] * 4)

    def upsample(self) -> None:
        factor = self._module.scale_factor
        # This mode has no region of interest, but the version of ONNX asks for one.
        region = self.graph.constant("region", np.zeros(0, np.float32))
        scales = self.graph.constant("scales", np.array([1, 1, factor, factor], np.float32))
        self._emit(
            "Resize",
            [self._input, region, scales],
            coordinate_transformation_mode="asymmetric",
            mode="nearest",
            nearest_mode="floor",
        )

    def identity(self) -> None:
        """What is left of a folded batch norm: whoever takes its output takes its input."""
        (taken,) = self.node.all_input_nodes
        self.node.replace_all_uses_with(taken)

    def add(self) -> None:
        self._emit("Add", map(_name, self.node.args))

    def concatenate(self) -> None:
        parts: Any = self.node.args[0]
        self._emit("Concat", map(_name, parts), axis=self.node.args[1])

    def item(self) -> None:
        """Slices of the last axes: x[..., a:b:c, d:e:f]."""
        slices: Any = self.node.args[1]
        axes = range(1 - len(slices), 0)
        cuts = [(axis, cut) for axis, cut in zip(axes, slices[1:], strict=True) if cut.step]
        integers = self.graph.integers
        self._emit(
            "Slice",
            [
                self._input,
                integers(*(cut.start or 0 for _, cut in cuts)),
                integers(*(cut.stop or _END for _, cut in cuts)),
                integers(*(axis for axis, _ in cuts)),
                integers(*(cut.step for _, cut in cuts)),
            ],
        )

    def sigmoid(self) -> None:
        self._emit("Sigmoid", [self._input])

    def flatten(self) -> None:
        """The axes behind the first two, whose sides stay (0)."""
        self._emit("Reshape", [self._input, self.graph.integers(0, 0, -1)])

    def transpose(self) -> None:
        self._emit("Transpose", [self._input], perm=[0, 2, 1])

    @property
    def _module(self) -> Any:
        return self.traced.get_submodule(str(self.node.target))

    @property
    def _input(self) -> str:
        return _name(self.node.args[0])

    def _emit(self, kind: str, inputs: Any, output: str | None = None, **attributes: Any) -> str:
        return self.graph.node(kind, inputs, output or _name(self.node), **attributes)


_OPERATIONS: dict[Any, Callable[[_Writer], None]] = {
    nn.Conv2d: _Writer.convolution,
    nn.SiLU: _Writer.silu,
    nn.MaxPool2d: _Writer.pool,
    nn.Upsample: _Writer.upsample,
    nn.Identity: _Writer.identity,
    operator.add: _Writer.add,
    operator.getitem: _Writer.item,
    torch.cat: _Writer.concatenate,
    "sigmoid": _Writer.sigmoid,
    "flatten": _Writer.flatten,
    "transpose": _Writer.transpose,
}


def _name(node: Any) -> str:
    """Name of a traced node's tensor in the file."""
    last = any(user.op == "output" for user in node.users)
    return "output" if last else str(node.name)


def _array(parameter: Tensor) -> Any:
    return parameter.detach().numpy()
