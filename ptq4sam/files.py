"""Files: JSON that is read with one-line errors, and writing at once or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptq4sam.errors import DataError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it replaces `path` if the block succeeds.

    Missing folders are made. Readers see the old file or the new one, never a part, also with
    several writers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: libraries choose the format by it.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def read_json(path: Path, what: str) -> tuple[Any, str]:
    """Read a JSON file.

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
        return json.loads(raw), hashlib.sha256(raw).hexdigest()[:16]
    except FileNotFoundError:
        raise DataError(f"there is no {what} {path}") from None
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {error.strerror}") from error
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
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def finite(value: object) -> Any:
    """The same, with None for each number that JSON does not have (NaN, infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
