"""What a run writes besides its metrics: folders that can be written to, the model, its scheme."""

from __future__ import annotations

import logging

from ptq4sam.deploy.size_report import size_report
from ptq4sam.deploy.storage import save
from ptq4sam.errors import ConfigError
from ptq4sam.files import refusal_to_write, write_text
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.record import PartRecord
from ptq4sam.runs.settings import RunSettings
from ptq4sam.sam.model import PromptableModel

_log = logging.getLogger(__name__)


def make_folders(settings: RunSettings) -> None:
    """Make the folders of all outputs, so that a run does not fail at its end.

    Raises:
        ConfigError: one cannot be made or written to.
    """
    folders = [settings.work_dir, settings.show_dir]
    for path in filter(None, (settings.results, settings.save_model)):
        if path.is_dir():
            raise ConfigError(f"asked to write file {path}, which is a folder: name a file")
        folders.append(path.parent)
    for folder in filter(None, folders):
        refusal = refusal_to_write(folder)
        if refusal is not None:
            raise ConfigError(f"{folder}: {refusal}: name another folder for what is written")


def save_model(context: RunContext, sam: PromptableModel) -> tuple[PartRecord, ...]:
    """Write the scheme of a quantized model, and the model where the run is to save it.

    Returns:
        The parts of the model's file; none where none was written.
    """
    described = context.settings.work_dir / "scheme.yaml"
    if not isinstance(sam, QuantizedSam):
        # That of an earlier run would be taken for this one's.
        described.unlink(missing_ok=True)
        return ()
    write_text(sam.scheme.to_yaml(), described)
    path = context.settings.save_model
    if path is None:
        return ()
    with context.phases.phase("save"):
        save(sam, path)
    sizes = size_report(path)
    _log.info("wrote %s: %s", path, sizes.summary())
    return tuple(PartRecord(**vars(part)) for part in sizes.parts)
