"""ONNX Runtime on the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.deploy.targets.target import (
    Arrays,
    Precision,
    Products,
    Target,
    require,
    unreadable,
)

# Unsigned codes: 1.31 fails to load some graphs with signed ones. Its integer products multiply
# sums with scales as the simulation does, but convolutions of dequantized factors are float32. A
# Gather copies single numbers slowly, a GatherElements spreads them over rows.
DIALECT = Dialect(
    codes="unsigned",
    products="worths",
    dequantizes="products",
    between="portable",
    convolutions="integer",
    lookup="GatherElements",
    whole_bytes=64 * 2**20,
    group_bytes=16 * 2**20,
    piece_bytes=16 * 2**20,
)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str],
        _precision: Precision = "f32",
        products: Products | None = None,
    ) -> None:
        runtime = require("onnxruntime", "onnx")
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
            raise unreadable(path, "ONNX Runtime", error) from error

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


TARGET = Target(
    name="onnxruntime",
    form="onnx",
    suffixes=(".onnx",),
    dialect=DIALECT,
    products=("int8", "int16"),
    open=OnnxRuntimeSession,
)
