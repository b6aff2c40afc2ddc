"""A work directory's report as a file."""

from __future__ import annotations

from pathlib import Path

from ptq4sam.distillation.training import CURVES
from ptq4sam.errors import ConfigError
from ptq4sam.files import write_text
from ptq4sam.report.distillation_report import distillation_page
from ptq4sam.report.folder import RunFolder
from ptq4sam.report.page import render
from ptq4sam.report.run_report import run_page
from ptq4sam.report.sweep_report import sweep_page
from ptq4sam.sweep.tasks import Folder

REPORT = "report.html"
"""Its name where none is given."""


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a work directory; returns the file.

    Args:
        folder: of a run, a sweep or a distillation.
        output: the file; None for one in the folder.

    Raises:
        ConfigError: the output is a folder.
        DataError: there is none of them in the folder, or a file of it is damaged.
        DependencyError: the extra `report` is not installed.
        StoreError: a sweep's records are damaged.
    """
    path = output or folder / REPORT
    if path.is_dir():
        raise ConfigError(f"asked to write the report to {path}, which is a folder: name a file")
    sweep = Folder(folder)
    if sweep.store.exists():
        page = sweep_page(sweep)
    elif (folder / CURVES).exists():
        page = distillation_page(folder)
    else:
        page = run_page(RunFolder.read(folder))
    text = render(page)
    write_text(text, path)
    return path
