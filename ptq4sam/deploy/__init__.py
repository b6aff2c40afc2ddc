"""Quantized models outside of the simulation: packed files, integer arithmetic, runtimes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq4sam.deploy.export import export
    from ptq4sam.deploy.exported import ExportedSam, open_exported

__all__ = ["ExportedSam", "export", "open_exported"]

_WHERE = {
    "ExportedSam": "ptq4sam.deploy.exported",
    "export": "ptq4sam.deploy.export",
    "open_exported": "ptq4sam.deploy.exported",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ptq4sam.deploy' has no attribute {name!r}")
