"""Sessions of the runtimes that exported graphs run on."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ptq4sam.deploy.float_products import with_float_products
from ptq4sam.errors import CheckpointError, DependencyError

Arrays = Mapping[str, NDArray[Any]]
Precision = Literal["f32", "bf16"]
PRECISIONS = get_args(Precision)

Products = Literal["int8", "int16", "float32"]
"""How codes are multiplied: int8 products are the fastest, and saturate on some processors."""
FORMS: dict[str, tuple[Products, ...]] = {
    "onnxruntime": ("int8", "int16"),
    "openvino": ("int8", "float32"),
}
"""Products that a runtime can be opened with, the fastest first."""

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Runtimes, and the format of the files that each takes."""

_EXTRAS = {**RUNTIMES, "nncf": "openvino"}


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Arrays, seconds: float | None = None) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order.

        Args:
            inputs: by name.
            seconds: end the computation when it has taken so long; None for never.

        Raises:
            TimeoutError: it was ended.
        """


def open_session(
    runtime: str,
    path: Path,
    outputs: Sequence[str],
    precision: Precision = "f32",
    products: Products | None = None,
) -> Session:
    """Load a graph for some of its outputs; what only others need is not computed.

    As many threads are used as torch uses; while they wait they leave the processor to others.

    Args:
        runtime: a key of RUNTIMES.
        path: the .onnx or .xml file.
        outputs: their names.
        precision: of what is not integer: "f32", or "bf16", which OpenVINO alone has.
        products: one of the runtime's FORMS; OpenVINO computes float32 ones of the graph of an
            exact export alone. None leaves them to the runtime.

    Raises:
        DependencyError: the runtime is not installed.
        CheckpointError: it cannot read the file.
    """
    if runtime == "onnxruntime":
        return OnnxRuntimeSession(path, outputs, products)
    return OpenVinoSession(path, outputs, precision, products)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(
        self, path: Path, outputs: Sequence[str], products: Products | None = None
    ) -> None:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait take a processor from whoever else wants it.
        for scope in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{scope}.allow_spinning", "0")
        # Without VNNI, and only there, this widens codes to 16 bits before they are multiplied.
        precise = "0" if products == "int8" else "1"
        options.add_session_config_entry("session.x64quantprecision", precise)
        # Freed memory of one size of inputs is of little use for another: prompts come in many.
        options.enable_cpu_mem_arena = False
        self._run_options = runtime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True
        self._runtime, self._outputs = runtime, list(outputs)
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions derive from nothing narrower
            raise _unreadable(path, "ONNX Runtime", error) from error

    def run(self, inputs: Arrays, seconds: float | None = None) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order; see `Session`."""
        if seconds is not None:
            return self._run_within(inputs, seconds)
        found = self._session.run(self._outputs, dict(inputs), self._run_options)
        return cast(list[NDArray[np.float32]], found)

    def _run_within(self, inputs: Arrays, seconds: float) -> list[NDArray[np.float32]]:
        # Of its own: what ends one run must not end the next.
        options = self._runtime.RunOptions()
        options.only_execute_path_to_fetches = True
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        ends = time.monotonic() + seconds
        timer.start()
        try:
            found = self._session.run(self._outputs, dict(inputs), options)
        except Exception as error:  # its exceptions derive from nothing narrower
            if time.monotonic() < ends:
                raise
            raise TimeoutError from error
        finally:
            timer.cancel()
        if time.monotonic() > ends:
            raise TimeoutError
        return cast(list[NDArray[np.float32]], found)


class OpenVinoSession:
    """A graph in OpenVINO on the CPU."""

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str],
        precision: Precision,
        products: Products | None = None,
    ) -> None:
        openvino = require("openvino")
        core = openvino.Core()
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise _unreadable(path, "OpenVINO", error) from error
        for result in model.results:
            if not result.input_value(0).names & set(outputs):
                model.remove_result(result)
        if products == "float32":
            model = with_float_products(model)
        # OpenVINO's own choice of precision depends on the processor: it must be said.
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if products is not None:
            # Activations that the runtime quantizes for itself have other codes.
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        self._compiled = core.compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._outputs = list(outputs)

    def run(self, inputs: Arrays, seconds: float | None = None) -> list[NDArray[np.float32]]:
        """Outputs that the session was opened for, in that order; see `Session`."""
        known = {name: value for name, value in inputs.items() if name in self._names}
        if seconds is not None:
            self._wait(known, seconds)
            found = self._request.results
        else:
            found = self._request.infer(known, share_inputs=True)
        return [np.array(found[name]) for name in self._outputs]

    def _wait(self, inputs: Arrays, seconds: float) -> None:
        """Compute within a time; errors as `Session.run`."""
        ends = time.monotonic() + seconds
        self._request.start_async(inputs, share_inputs=True)
        done = self._request.wait_for(round(1000 * seconds))
        if not done:
            self._request.cancel()
            # Its way of saying that it was ended; one that has just come to its end says nothing.
            with contextlib.suppress(RuntimeError):
                self._request.wait()
        if not done or time.monotonic() > ends:
            raise TimeoutError

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
