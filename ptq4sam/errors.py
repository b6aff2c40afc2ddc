"""Named errors. Each message is one line: what was asked, what was found, what to do."""

from __future__ import annotations

import re

_ON_GPU = re.compile(
    r"CUDA (error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_(ALLOC_FAILED|"
    r"INTERNAL_ERROR\w*)",
    re.IGNORECASE,
)
"""cuBLAS and cuDNN have words of their own for no room; cuDNN's internal errors mostly are that."""
_OUT_OF_MEMORY = re.compile(
    rf"out of memory|not enough memory|can't allocate memory|{_ON_GPU.pattern}", re.IGNORECASE
)


class Ptq4samError(Exception):
    """Base of every error that a user can cause and fix; the command line prints one line."""


class ConfigError(Ptq4samError):
    """A configuration file, scheme or command-line value is not usable."""


class DataError(Ptq4samError):
    """An image, annotation or prompt is missing or damaged."""


class CheckpointError(Ptq4samError):
    """A weight file does not fit the model that was asked for, or is damaged."""


class DeployError(Ptq4samError):
    """A quantized model cannot be computed exactly in the form that was asked for."""


class CalibrationError(Ptq4samError):
    """Calibration or reconstruction cannot give a usable quantized model."""


class DependencyError(Ptq4samError):
    """An optional package that the request needs is not installed."""


class MissingError(CheckpointError, DataError, DependencyError):
    """Files or packages that a request needs are not there; the message names all of them.

    Args:
        message: all of it in one line.
        listing: the same for a terminal, in several.
    """

    def __init__(self, message: str, listing: str = "") -> None:
        super().__init__(message)
        self.listing = listing or message


class ResourceError(Ptq4samError):
    """Memory or disk is used up; the message names the knob to turn."""


class StoreError(Ptq4samError):
    """A file of results is locked, damaged or another program's."""


class DownloadError(Ptq4samError):
    """A file cannot be had from its publisher, or another one came."""


def reason(error: OSError) -> str:
    """Why the system refused something, without the file's name."""
    return error.strerror or " ".join(map(str, error.args)) or type(error).__name__


def in_one_line(error: OSError) -> str:
    """The file, where the error names one, and why the system refused it."""
    return reason(error) if error.filename is None else f"{error.filename}: {reason(error)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was used up: torch raises RuntimeErrors of all kinds."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def gpu_memory_advice(error: BaseException) -> str:
    """What else helps where a GPU's memory was used up, to go behind other advice; else nothing."""
    if _ON_GPU.search(str(error)) is None:
        return ""
    return (
        "; where much is free but in pieces, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in "
        "the environment helps"
    )
