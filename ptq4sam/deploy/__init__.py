"""Quantized models outside of the simulation: packed files, integer arithmetic, runtimes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq4sam.deploy.exported import ExportedSam, open_exported
    from ptq4sam.deploy.reference import integer_model

__all__ = ["ExportedSam", "integer_model", "open_exported"]

_WHERE = {
    "ExportedSam": "ptq4sam.deploy.exported",
    "integer_model": "ptq4sam.deploy.reference",
    "open_exported": "ptq4sam.deploy.exported",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ptq4sam.deploy' has no attribute {name!r}")
