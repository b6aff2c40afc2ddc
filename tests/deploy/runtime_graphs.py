"""Small graphs in both runtimes."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray

from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.products import exact_products
from ptq4sam.deploy.targets import TARGETS
from ptq4sam.deploy.targets.dialect import Dialect

RUNTIMES = tuple(TARGETS)


def dialect(runtime: str) -> Dialect:
    """How exact graphs are written for a runtime."""
    return TARGETS[runtime].dialect


def given(graph: Graph, x: torch.Tensor, name: str = "x") -> Traced:
    """An input of a graph, of the shape of a tensor."""
    return Traced(graph, graph.input(name, np.float32, x.shape), x.shape)


def run_graph(
    graph: Graph, runtime: str, folder: Path, inputs: dict[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Outputs of a graph, in a session as exported models get one on this processor."""
    path = folder / "graph.onnx"
    graph.write(path, {})
    names = [output.name for output in onnx.load(path).graph.output]
    outputs: list[NDArray[Any]] = []
    target = TARGETS[runtime]
    outputs += target.open(path, names, "f32", exact_products(target)).run(inputs)
    return outputs


def in_openvino(path: Path) -> Any:
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_precisions(path: Path, kinds: tuple[str, ...]) -> collections.Counter[str]:
    """In how many layers of these kinds OpenVINO computes with which precision."""
    found: collections.Counter[str] = collections.Counter()
    for node in in_openvino(path).get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in kinds:
            found[info["runtimePrecision"].astype(str)] += 1
    return found


def onnxruntime_operators(path: Path, folder: Path) -> collections.Counter[str]:
    """What ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "optimized.onnx")
    return collections.Counter(node.op_type for node in model.graph.node)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root of the squared error as a share of the expected tensor's."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
