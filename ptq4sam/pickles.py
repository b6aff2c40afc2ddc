"""Reading what torch.save wrote without running anything that the file names.

A checkpoint of a training holds more than tensors. What is harmless there, and of no use here, is
replaced by a stand-in; whatever else a file names, torch's weights-only reader refuses.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ptq4sam.contents import damaged_entry, otherwise

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    pickle.UnpicklingError,
    struct.error,
)
"""What `load_pickle` raises: a damaged stream fails in as many ways as it has operations."""

_HARMLESS = {
    # Numbers, arrays and their types, as metrics and random states have them.
    "numpy": "ndarray dtype bool_ float16 float32 float64 int32 int64 uint8",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
    "numpy.random._pcg64": "PCG64",
    "numpy.random._mt19937": "MT19937",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    # Settings of a training, when and where it was.
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "typing": "Any",
    "collections": "defaultdict",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "addict.addict": "Dict",
    "easydict": "EasyDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "mmengine.config.config": "Config ConfigDict",
    "mmengine.logging.history_buffer": "HistoryBuffer",
    "omegaconf.base": "ContainerMetadata Metadata UnionNode",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode PathNode StringNode",
    "yacs.config": "CfgNode",
    # With getattr, since mmengine keeps methods of its history as getattr(HistoryBuffer, "mean").
    "builtins": "bool bytes dict float frozenset getattr int list object range slice str tuple "
    "type",
}
"""Names, by module, that stand-ins are put in the place of."""


class StandIn(dict[Any, Any]):
    """Takes the place of whatever a file names: made and filled by the file, without an effect.

    So a file may name `getattr` and get this class, and no code but this runs. It is a dict since
    some of those that it stands for are filled as dicts are.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Take no notice of what the file says the object holds."""

    # What it stands for may be a key of a dict.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def load_pickle(path: Path) -> Any:
    """Read a file that torch.save wrote; tensors are mapped into memory where they can be.

    Raises:
        One of UNREADABLE: it is something else, damaged, or names what could run code (see
            `refused_name`).
    """
    instead = otherwise(path)
    if instead is not None:
        raise ValueError(f"it {instead}")
    damaged = damaged_entry(path)
    if damaged is not None:
        raise ValueError(f"the checksum of its entry {damaged} is wrong")
    stand_ins = [
        (StandIn, f"{module}.{name}")
        for module, names in _HARMLESS.items()
        for name in names.split()
    ]
    with torch.serialization.safe_globals([*stand_ins]), warnings.catch_warnings():
        # torch warns of other protocols, which it then reads or refuses.
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        # Only zip archives can be mapped; torch.load reads the older format whole.
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )


def refused_name(error: BaseException) -> str | None:
    """The class or function that made `load_pickle` refuse a file; None for other errors."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    text = str(error)
    if "reduce for unrecognized function" in text:
        # What the file made of the names, such as a method of one of them.
        return "function call"
    named = re.search(r"GLOBAL (\S+)|<class '([\w.]+)'>", text)
    return None if named is None else (named[1] or named[2])


def short_reason(error: BaseException) -> str:
    """What an error of `load_pickle` says, without the advice that torch adds; one short line."""
    text = str(error).strip() or type(error).__name__
    inner = re.search(r"Unpickler error:\s*([^\n]+)", text)
    line = text.splitlines()[0] if inner is None else inner[1]
    return line.partition(". ")[0][:100].strip()
