"""How float32 products are rounded: what torch is set to, and the one place that sets it for runs.

A GPU may round the factors of a float32 product to 11 bits (TF32), a CPU to 8 (bfloat16), where a
program or its environment allows it; convolutions of cuDNN do so by default. torch has two families
of settings for that. Reading one after something was set by the other raises an error, but the
older ones set both, in every version, and the newer ones, one for each operation from torch 2.9 on,
can always be read.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any, Literal

import torch

from ptq4sam.errors import ConfigError

Products = Literal["ieee", "tf32", "bf16"]
"""What the factors of a float32 product are rounded to: nothing less, 11 bits, 8 bits."""

_OLDER: dict[str, Products] = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_NAME = "fp32_precision"


def float32_products(device: torch.device) -> Products:
    """What the factors of float32 matrix products are rounded to on a device."""
    backends: Any = torch.backends
    operation = backends.cuda.matmul if device.type == "cuda" else _of(backends.mkldnn, "matmul")
    newer: str | None = getattr(operation, _NAME, None)
    if newer is None:
        return _OLDER[torch.get_float32_matmul_precision()]
    return "tf32" if newer == "tf32" else "bf16" if newer == "bf16" else "ieee"


def float32_convolutions() -> Products:
    """What cuDNN rounds the factors of float32 convolutions to."""
    newer: str | None = getattr(_of(torch.backends.cudnn, "conv"), _NAME, None)
    if newer is not None:
        return "tf32" if newer == "tf32" else "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


@contextlib.contextmanager
def products_of(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Float32 matrix products are rounded so within the `with` block.

    Args:
        precision: "highest" for IEEE's float32, "high" for TF32 where there is one.
    """
    with _put_back():
        torch.set_float32_matmul_precision(precision)
        yield


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Within the `with` block numbers come out again, on a GPU too.

    Products and convolutions are IEEE's float32, and cuDNN takes neither kernels that add in any
    order nor those that were fastest this time.
    """
    cudnn = torch.backends.cudnn
    with _put_back():
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for name in ("conv", "rnn"):
            # What is set for all operations counts where this one is not set.
            if getattr(_of(cudnn, name), _NAME, "ieee") not in ("ieee", "none"):
                setattr(_of(cudnn, name), _NAME, "ieee")
        cudnn.deterministic, cudnn.benchmark = True, False
        yield


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """All of these settings are behind the `with` block what they were before."""
    cudnn = torch.backends.cudnn
    before = [
        (operation, name, getattr(operation, name))
        for operation, name in (
            (cudnn, "deterministic"),
            (cudnn, "benchmark"),
            (torch.backends.cuda.matmul, _NAME),
            (_of(torch.backends.mkldnn, "matmul"), _NAME),
            (_of(cudnn, "conv"), _NAME),
            (_of(cudnn, "rnn"), _NAME),
        )
        if hasattr(operation, name)
    ]
    matmul, convolutions = _older()
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for operation, name, value in before:
            if getattr(operation, name) != value:
                setattr(operation, name, value)


def _older() -> tuple[str | None, bool | None]:
    """The older settings, of products and of convolutions; None where a newer one hides them."""
    matmul, convolutions = None, None
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    return matmul, convolutions


def _of(backend: Any, operation: str) -> Any:
    """The newer settings of an operation; None before torch 2.9."""
    return getattr(backend, operation, None)


def description(device: torch.device) -> dict[str, str]:
    """A device and how it computes: what the last bits of numbers depend on, by name.

    Random numbers too depend on which GPU it is: they are drawn in as many streams as fit on it.
    """
    found = {"device": device.type, "float32 products": float32_products(device)}
    if device.type != "cuda":
        return found
    cudnn = torch.backends.cudnn
    return {
        **found,
        "device": f"{device.type} {torch.cuda.get_device_name(device)}",
        "float32 convolutions": float32_convolutions(),
        "deterministic convolutions": str(cudnn.deterministic and not cudnn.benchmark),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": _version("triton"),
    }


def fingerprint(device: torch.device) -> str:
    """`description` in one line, for what is kept of a device's numbers."""
    return ", ".join(f"{name} {value}" for name, value in description(device).items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def require_float64(device: torch.device) -> None:
    """Refuse a device that has no float64, which exact sums and searches for scales need.

    Raises:
        ConfigError: it has none (Apple's and some of Intel's GPUs).
    """
    if device.type == "meta":
        return
    try:
        torch.ones(1, dtype=torch.float64, device=device).div_(3).item()
    except (TypeError, RuntimeError) as error:
        # A driver that fails or a device that is full says nothing of float64.
        if not any(word in str(error) for word in ("float64", "fp64", "double", "Double")):
            raise
        raise ConfigError(
            f"asked for device {str(device)!r}, which has no float64 numbers; exact sums and "
            "searches for scales need them: use cpu or cuda"
        ) from error
