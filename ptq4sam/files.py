"""Files: JSON that is read with one-line errors, and writing at once or not at all."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from ptq4sam.errors import DataError, reason

_SYSTEM_ERROR = re.compile(r"I/O error: (.*?) \(os error (\d+)\)")
"""What safetensors says where the system refuses something."""

_GZIP = b"\x1f\x8b"
"""What a gzip file begins with."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it replaces `path` if the block succeeds.

    Missing folders are made. Readers see the old file or the new one, never a part, also with
    several writers.

    Raises:
        OSError: the system refuses it, as on a full disk; the error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent, path.name, path) as folder:
        # The suffix is kept: libraries choose the format by it.
        temporary = folder / path.name
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_folder(parent: Path, stem: str, named: Path) -> Iterator[Path]:
    """A folder in another one for the `with` block, as files are written that are then renamed.

    Args:
        parent: the other one.
        stem: becomes a part of its name.
        named: what errors about its files name.

    Raises:
        OSError: as of `replacing`.
    """
    prefix = f".{stem}."
    with (
        naming(named, prefix),
        # A file that a reader still has open cannot be removed on Windows.
        tempfile.TemporaryDirectory(
            prefix=prefix, dir=parent, ignore_cleanup_errors=True
        ) as folder,
    ):
        yield Path(folder)


@contextlib.contextmanager
def naming(path: Path, temporary: str | None = None) -> Iterator[None]:
    """What the system refuses within the `with` block is an error that names a file.

    Args:
        path: named where the error itself names nothing.
        temporary: beginning of the name of a folder, whose files are not to be named either.

    Raises:
        OSError: the error; safetensors' own are turned into it.
    """
    try:
        yield
    except SafetensorError as error:
        found = _SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        code = int(found[2])
        # The fourth argument: on Windows the code is not one of errno's.
        raise OSError(code, found[1], str(path), code) from error
    except OSError as error:
        if error.filename is not None and not _is_below(error.filename, temporary):
            raise
        error.strerror, error.filename = reason(error), str(path)
        raise


def _is_below(name: object, temporary: str | None) -> bool:
    """Whether a file is in a folder whose name begins so."""
    return temporary is not None and any(
        part.startswith(temporary) for part in Path(str(name)).parts
    )


def refusal_to_write(folder: Path) -> str | None:
    """Why no file can be made in a folder, itself made where it is missing; None where one can."""
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell, least of all on Windows.
        probe.touch()
        probe.unlink()
    except OSError as error:
        return reason(error)
    return None


def write_text(text: str, path: Path) -> None:
    """Write a text atomically, in UTF-8 and with its own ends of lines; errors as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def save_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture atomically, in the format of its suffix; errors as `replacing`.

    Args:
        picture: what.
        path: the file.
        options: Pillow's for the format.
    """
    with replacing(path) as temporary:
        picture.save(temporary, **options)


def read_json(path: Path, what: str) -> tuple[Any, str]:
    """Read a JSON file, which may be compressed by gzip, whatever its name.

    Args:
        path: the file.
        what: what it is, for messages, as "annotations file".

    Returns:
        Its content, and a fingerprint of its bytes.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw.startswith(_GZIP) else raw
        return json.loads(content), hashlib.sha256(raw).hexdigest()[:16]
    except FileNotFoundError:
        raise DataError(f"there is no {what} {path}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{what} {path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} is not JSON: {error}") from error


def write_json(value: object, path: Path, *, compact: bool | None = None) -> None:
    """Write JSON atomically.

    A number that is none (NaN, infinity), which JSON does not have, is written as null.

    Args:
        value: what `json` can write.
        path: the file.
        compact: all on one line; None for so with a list, not so with a mapping.
    """
    if compact is None:
        compact = not isinstance(value, Mapping)
    text = json.dumps(finite(value), indent=None if compact else 2, allow_nan=False)
    write_text(text + "\n", path)


def finite(value: object) -> Any:
    """The same, with None for each number that JSON does not have (NaN, infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
