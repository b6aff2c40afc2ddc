"""What a runtime that models are exported for is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ptq4sam.deploy.targets.dialect import Dialect
from ptq4sam.errors import CheckpointError, DependencyError

Arrays = Mapping[str, NDArray[Any]]
Precision = Literal["f32", "bf16"]
PRECISIONS = get_args(Precision)

Products = Literal["int8", "int16", "float32"]
"""How codes are multiplied: int8 products are the fastest, and saturate on some processors."""


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


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: of the runtime and of its package.
        form: the format of its files, which is the extra that installs it too.
        suffixes: of the files of a graph; the first is the one that the runtime opens.
        dialect: of graphs whose codes are the simulation's.
        fast: of graphs that leave more to the runtime's own operators; None where there is none.
        products: that codes can be multiplied with, the fastest first.
        held: products that files can have without others.
        precisions: of what is not integer.
        open: loads a file for some of its outputs, with a precision and products (None leaves them
            to the runtime).
        convert: writes the target's files beside an ONNX file, of a quantized model or not, with
            products that they hold; None where the ONNX file is what the runtime opens.
    """

    name: str
    form: str
    suffixes: tuple[str, ...]
    dialect: Dialect
    products: tuple[Products, ...]
    open: Callable[[Path, Sequence[str], Precision, Products | None], Session]
    fast: Dialect | None = None
    held: tuple[Products, ...] = ()
    precisions: tuple[Precision, ...] = ("f32",)
    convert: Callable[[Path, bool, Products | None], None] | None = None


def require(package: str, extra: str = "") -> Any:
    """A package, as a runtime's.

    Args:
        package: its name.
        extra: of ptq4sam that installs it; by default the one of this name.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DependencyError(
            f"{package} was asked for and is not installed: "
            f"pip install 'ptq4sam[{extra or package}]'"
        ) from error


def unreadable(path: Path, runtime: str, error: Exception) -> CheckpointError:
    """What to say of a file that a runtime cannot load."""
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{runtime} cannot load {path} ({reason}): export the model again")
