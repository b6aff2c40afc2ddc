"""What a run reads, looked for before anything is computed and told of at once."""

from __future__ import annotations

from pathlib import Path

from ptq4sam.downloads import Missing
from ptq4sam.families import VARIANTS
from ptq4sam.prompts.spec import is_boxes_file, look_for_prompts
from ptq4sam.runs.settings import (
    DEFAULT_MODEL,
    AccuracySettings,
    DataSettings,
    RunSettings,
)

OTHER_BOXES = "boxes of any detector can be given instead, as prompts boxes.json"


def require_inputs(settings: RunSettings) -> None:
    """Look for everything that a run reads.

    Raises:
        MissingError: files or packages are not there; one line names all of them, and how to get
            them.
        ConfigError: a prompt source's name is not understood.
    """
    missing = Missing()
    sources = [settings.prompts] if settings.data is not None else []
    if settings.scheme is not None and settings.calibration_prompts is not None:
        sources.append(settings.calibration_prompts)
    elif settings.scheme is not None and not is_boxes_file(settings.prompts):
        sources.append(settings.prompts)
    for source in dict.fromkeys(sources):
        look_for_prompts(missing, source)
    otherwise = OTHER_BOXES if missing else ""
    look_for_sam(missing, settings.model, settings.checkpoint)
    look_for_sam(missing, settings.model, settings.float_checkpoint)
    look_for_data(missing, settings.data)
    if settings.scheme is not None:
        enough = settings.scheme.calibrate
        look_for_data(missing, settings.calibration, "calibration ", enough)
    look_for_validation(missing, settings.accuracy)
    missing.report(otherwise)


def look_for_sam(missing: Missing, model: str | None, checkpoint: Path | None) -> None:
    """Note a SAM's weights, or a quantized or exported model, that are not there."""
    name = model or DEFAULT_MODEL
    advice = "name another, or none for the embedded weights"
    variant = VARIANTS.get(name)
    if variant is not None and variant.weights.download is not None:
        advice = f"the official one: ptq4sam download {variant.weights.download}"
    missing.look_for("SAM", checkpoint, advice)


def look_for_data(
    missing: Missing, data: DataSettings | None, whose: str = "", enough: int | None = None
) -> None:
    """Note pictures and annotations that are not there.

    Args:
        missing: is told.
        data: the data set.
        whose: "calibration " or the like, for the message.
        enough: how many of the first annotated pictures are needed; None for all.
    """
    if data is not None:
        missing.look_for(f"{whose}pictures", data.images, enough=enough)
        missing.look_for(f"{whose}annotations", data.annotations)


def look_for_validation(missing: Missing, accuracy: AccuracySettings | None) -> None:
    """Note pictures and annotations of their own, that accuracy is measured on and that lack."""
    if accuracy is not None and accuracy.images is not None:
        look_for_data(missing, DataSettings(accuracy.images, accuracy.annotations), "validation ")
