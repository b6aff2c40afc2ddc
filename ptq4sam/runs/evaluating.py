"""The evaluation of a run: scores, masks as COCO results, pictures to look at."""

from __future__ import annotations

import logging

from ptq4sam import parallel
from ptq4sam.data import ImageSet
from ptq4sam.evaluation import write_json
from ptq4sam.evaluation.evaluate import Evaluation, Picture, evaluate_sam, has_truth
from ptq4sam.prompts import PromptSource
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.models import RunModels
from ptq4sam.runs.pictures import PictureWriter
from ptq4sam.runs.record import PictureRecord, PictureScore
from ptq4sam.runs.recording import PictureRecorder

_log = logging.getLogger(__name__)


def evaluate_run(
    context: RunContext, models: RunModels, dataset: ImageSet, source: PromptSource
) -> tuple[Evaluation, tuple[PictureScore, ...], tuple[PictureRecord, ...]]:
    """Score a run's model and write its masks and pictures where the settings say so.

    Returns:
        The evaluation, scores of all pictures, and the worst pictures.

    Raises:
        DataError: a picture is damaged and not to be skipped, or none is left.
    """
    settings = context.settings
    show_dir, results = settings.show_dir, settings.results
    if not has_truth(dataset):
        show_dir = show_dir or settings.work_dir / "show"
        results = results or settings.work_dir / "masks.json"
    writer = None
    reference = models.reference
    if show_dir is not None:
        writer = PictureWriter(show_dir, dataset, settings.show_threshold)
    elif not settings.score:
        reference = None
    recorder = PictureRecorder(settings.show_threshold)

    def look(picture: Picture) -> None:
        recorder(picture)
        if writer is not None:
            writer(picture)

    with context.phases.phase("evaluate"):
        evaluation = evaluate_sam(
            models.sam,
            dataset,
            source,
            settings.prompting,
            reference=reference,
            progress=context.progress,
            on_picture=look,
            score=settings.score,
        )
        scores, worst = recorder.scores(), recorder.worst()
    evaluation.skipped = dict(dataset.skipped)
    if results is not None and parallel.is_first():
        write_json(evaluation.results, results)
        _log.info("wrote %d masks to %s", evaluation.masks, results)
    return evaluation, scores, worst
