"""Sessions of the runtimes that exported graphs run on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ptq4sam.errors import CheckpointError, DependencyError

Arrays = Mapping[str, NDArray[Any]]
Precision = Literal["f32", "bf16"]
PRECISIONS = get_args(Precision)

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Runtimes, and the format of the files that each takes."""

_EXTRAS = {**RUNTIMES, "nncf": "openvino"}


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Arrays) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order."""


def open_session(
    runtime: str, path: Path, outputs: Sequence[str], precision: Precision = "f32"
) -> Session:
    """Load a graph for some of its outputs; what only others need is not computed.

    As many threads are used as torch uses.

    Args:
        runtime: a key of RUNTIMES.
        path: the .onnx or .xml file.
        outputs: their names.
        precision: of what is not integer: "f32", or "bf16", which OpenVINO alone has.

    Raises:
        DependencyError: the runtime is not installed.
        CheckpointError: it cannot read the file.
    """
    if runtime == "onnxruntime":
        return OnnxRuntimeSession(path, outputs)
    return OpenVinoSession(path, outputs, precision)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(self, path: Path, outputs: Sequence[str]) -> None:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Freed memory of one size of inputs is of little use for another: prompts come in many.
        options.enable_cpu_mem_arena = False
        self._run_options = runtime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True
        self._outputs = list(outputs)
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions derive from nothing narrower
            raise _unreadable(path, "ONNX Runtime", error) from error

    def run(self, inputs: Arrays) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order."""
        found = self._session.run(self._outputs, dict(inputs), self._run_options)
        return cast(list[NDArray[np.float32]], found)


class OpenVinoSession:
    """A graph in OpenVINO on the CPU."""

    def __init__(self, path: Path, outputs: Sequence[str], precision: Precision) -> None:
        openvino = require("openvino")
        core = openvino.Core()
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise _unreadable(path, "OpenVINO", error) from error
        for result in model.results:
            if not result.input_value(0).names & set(outputs):
                model.remove_result(result)
        # OpenVINO's own choice of precision depends on the processor: it must be said.
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled = core.compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._outputs = list(outputs)

    def run(self, inputs: Arrays) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order."""
        known = {name: value for name, value in inputs.items() if name in self._names}
        found = self._request.infer(known, share_inputs=True)
        return [np.array(found[name]) for name in self._outputs]

    @property
    def _names(self) -> set[str]:
        return {name for port in self._compiled.inputs for name in port.names}

    def layer_precisions(self) -> dict[str, str]:
        """The precision in which each layer is computed, by its name in the runtime's own graph."""
        return {
            node.get_friendly_name(): node.get_rt_info()["runtimePrecision"].astype(str)
            for node in self._compiled.get_runtime_model().get_ops()
            if "runtimePrecision" in node.get_rt_info()
        }


def require(runtime: str) -> Any:
    """The package of a runtime, or nncf.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise DependencyError(
            f"{runtime} was asked for and is not installed: "
            f"pip install 'ptq4sam[{_EXTRAS[runtime]}]'"
        ) from error


def _unreadable(path: Path, runtime: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{runtime} cannot load {path} ({reason}): export the model again")
