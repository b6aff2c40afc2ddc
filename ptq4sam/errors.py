"""Named errors. Each message is one line: what was asked, what was found, what to do."""

from __future__ import annotations

import re

_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


class Ptq4samError(Exception):
    """Base of every error that a user can cause and mend; the command line prints one line."""


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
    """Files or packages that a request needs are not there; the message names all of them."""


class ResourceError(Ptq4samError):
    """Memory or disk is used up; the message names the knob to turn."""


class StoreError(Ptq4samError):
    """A file of results is locked, damaged or another program's."""


class DownloadError(Ptq4samError):
    """A file cannot be had from its publisher, or another one came."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was used up: torch raises RuntimeErrors of all kinds."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )
