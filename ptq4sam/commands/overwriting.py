"""Nothing that a command reads is written over by it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ptq4sam.errors import ConfigError

_WRITTEN = ("output", "show_dir")
_READ = (
    *("checkpoint", "float_checkpoint", "teacher_checkpoint", "init", "model", "run_folder"),
    *("scheme", "settings", "file", "prompts", "calibration_prompts", "detector"),
    *("images", "calibration_images", "validation_images"),
    *("annotations", "calibration_annotations", "validation_annotations"),
)
"""Parsed arguments that name files and folders, whichever command has them."""


def refuse_overwriting(parsed: argparse.Namespace) -> None:
    """Refuse outputs that are inputs.

    Raises:
        ConfigError: one is.
    """
    for output in _WRITTEN:
        written = getattr(parsed, output, None)
        # A command may write several files of one content.
        for path in written if isinstance(written, list) else [written]:
            for given in _READ:
                read = getattr(parsed, given, None)
                if path is not None and read is not None and _is_same(path, read):
                    raise ConfigError(
                        f"--{output.replace('_', '-')} {path} would be written over what is read "
                        f"as {given.replace('_', ' ')}: name another"
                    )


def _is_same(one: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
