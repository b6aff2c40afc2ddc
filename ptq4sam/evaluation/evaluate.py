"""Score a SAM on a data set: mask AP, mean IoU, agreement with the float model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam import parallel
from ptq4sam.data import CocoDataset, ImageRecord, ImageSet
from ptq4sam.errors import ConfigError, DataError
from ptq4sam.evaluation import MaskScores, mask_ious, mask_results, mean_iou_by_size
from ptq4sam.evaluation.clicks import segment_by_clicks
from ptq4sam.evaluation.evaluators import Evaluator, evaluator_of
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import Segmented, segment
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import CocoResults, GroundTruth, Prompts, PromptSource
from ptq4sam.prompts.agreement import warn_of_miscategorized
from ptq4sam.prompts.record import warn_of_categories
from ptq4sam.sam.model import PromptableModel
from ptq4sam.sam.predictor import Predictor
from ptq4sam.threads import suited_to_model

AFTER_CLICK = "mean_iou_clicks_"
"""Metrics of clicks: the mean IoU after so many."""


@dataclass(frozen=True)
class Picture:
    """One evaluated picture, for whoever wants to draw or keep it.

    Attributes:
        record: the picture's entry in the data set.
        image: RGB uint8 [height, width, 3].
        prompts: boxes that were used.
        segmented: masks of the evaluated model.
        reference: masks of the float model, or None.
        agreement: IoU of each mask with the float model's; empty without one.
        ious: IoU of each mask with the truth; empty where prompts are not ground truth.
        float_ious: the same of the float model.
    """

    record: ImageRecord
    image: NDArray[np.uint8]
    prompts: Prompts
    segmented: Segmented
    reference: Segmented | None
    agreement: Sequence[float] = ()
    ious: Sequence[float] = ()
    float_ious: Sequence[float] = ()


@dataclass
class Evaluation:
    """Scores of one model, with those of the float model for the same prompts.

    Attributes:
        metrics: AP, AP50, AP75, APs, APm, APl, AR in percent, on LVIS also APr, APc, APf; where
            prompts are ground truth mean_iou, the same by size as mean_iou_small, _medium and
            _large, and iou_error, the mean absolute error of the predicted IoUs; with clicks
            also mean_iou_clicks_N after each click and mean_iou_best_of_three after the first;
            agreement where there is a float model to agree with. Without annotations only
            agreement.
        reference_metrics: the same of the float model.
        evaluator: who computed AP and AR; None without them.
        results: the masks as COCO results.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    reference_metrics: dict[str, float] = field(default_factory=dict)
    evaluator: Evaluator | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    pictures: int = 0
    masks: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What a model's masks on one picture add to its scores; it may travel between processes.

    Attributes:
        results: masks in the COCO results format.
        ious: of each mask with the truth, where prompts are ground truth.
        areas: of these objects, in pixels, as annotated.
        predicted: the model's own estimates of those.
        by_click: IoUs of each object after each click.
        best_of_three: IoU of the best mask of each object's first click.
    """

    results: list[dict[str, Any]]
    ious: list[float]
    areas: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    by_click: list[list[float]] = field(default_factory=list)
    best_of_three: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Outcome:
    """One picture: the model's part, the float model's, and how well they agree."""

    model: Scored | None = None
    reference: Scored | None = None
    agreement: Sequence[float] = ()


def select(prompts: Prompts, prompting: Prompting) -> Prompts:
    """The boxes that are used: above the threshold, at most so many, highest scores first."""
    return prompts.above(prompting.score_threshold).first(prompting.max_per_image)


def has_truth(dataset: ImageSet) -> bool:
    """Whether masks on a data set can be scored."""
    return isinstance(dataset, CocoDataset) and bool(dataset.annotated_images())


def require_truth(dataset: ImageSet, annotations: Path | None) -> CocoDataset:
    """A data set that accuracy can be measured on.

    Args:
        dataset: the pictures.
        annotations: their file, for the message.

    Raises:
        ConfigError: no picture is annotated, or with crowd regions alone, which prompt nothing and
            do not count.
    """
    if not isinstance(dataset, CocoDataset) or not has_truth(dataset):
        raise ConfigError(
            f"accuracy is measured on annotated pictures, but {annotations} has no "
            "annotations of those: give others"
        )
    if all(one.iscrowd for record in dataset.images for one in dataset.instances(record)):
        raise ConfigError(
            f"accuracy is measured on single objects, but {annotations} has crowd regions alone "
            "on those pictures: give others"
        )
    return dataset


@suited_to_model
def evaluate_sam(
    sam: PromptableModel,
    dataset: ImageSet,
    source: PromptSource,
    prompting: Prompting,
    *,
    reference: PromptableModel | None = None,
    progress: Progress = silent,
    on_picture: Callable[[Picture], None] | None = None,
    score: bool = True,
) -> Evaluation:
    """Prompt a SAM with boxes on every picture and score its masks.

    Several processes (see `parallel`) share the pictures, and each gets the scores of all.

    A picture without boxes is not encoded; its missed objects still count. A damaged picture that
    the data set is told to skip does not count at all. Masks of categories that the data set lacks
    are among the results, but cannot score: a warning counts them.

    Args:
        sam: the model, float or quantized, in torch or exported.
        dataset: pictures and, for scores, their truth.
        source: where boxes come from.
        prompting: how boxes prompt and how masks are scored.
        reference: the model, mostly the float one, to measure agreement with (mean IoU of masks
            for the same boxes).
        progress: shows how far it is.
        on_picture: called with each evaluated picture.
        score: compute metrics; else only collect the masks.

    Raises:
        DataError: a picture is damaged and not to be skipped, or none is left; an object has no
            mask that could be scored.
        DependencyError: the data set is LVIS's, and what scores it is not installed.
    """
    if score and isinstance(dataset, CocoDataset):
        dataset.require_masks()
        if has_truth(dataset):
            evaluator_of(dataset)
    images = dataset.images
    predictor = Predictor(sam)
    reference_predictor = Predictor(reference) if reference is not None else None
    outcomes: list[_Outcome | None] = []
    # Boxes of a detector; those of a file are looked at when it is opened.
    detected: list[tuple[ImageRecord, Prompts]] = []
    for record in progress(parallel.share(images), "segmenting"):
        image = dataset.load_or_skip(record)
        if image is None:
            outcomes.append(None)
            continue
        prompts = select(source.prompts(record, image), prompting)
        if not isinstance(source, (CocoResults, GroundTruth)):
            detected.append((record, prompts))
        if len(prompts.boxes) == 0:
            outcomes.append(_Outcome())
            continue
        # Annotated boxes all score 1, so that what `select` leaves are the first ones.
        truth, areas = _truth(source, record, len(prompts))
        asked = _Asked(record, image, prompts, truth, areas, prompting, getattr(source, "count", 0))
        outcome, picture = _compare(asked, predictor, reference_predictor)
        outcomes.append(outcome)
        if on_picture is not None:
            on_picture(picture)
    every = parallel.gather(outcomes)
    for record, found in zip(images, every, strict=True):
        if found is None:
            dataset.leave_out(record)
    evaluation = _summarize(dataset, every, score, reference is not None)
    # Those of a file were looked at when it was opened.
    if parallel.is_first() and not isinstance(source, CocoResults):
        used = Counter(result["category_id"] for result in evaluation.results)
        warn_of_categories(source.name, used, dataset)
        if detected:
            warn_of_miscategorized(source.name, dataset, detected)
    return evaluation


@dataclass(frozen=True)
class _Asked:
    """What a model is asked on one picture; with clicks by so many of them, else by boxes."""

    record: ImageRecord
    image: NDArray[np.uint8]
    prompts: Prompts
    truth: NDArray[np.bool_] | None
    areas: Sequence[float]
    prompting: Prompting
    clicks: int

    def of(self, predictor: Predictor) -> tuple[Segmented, Scored]:
        """A model's masks, and what they add to its scores."""
        embedding = predictor.embed(self.image)
        if self.clicks and self.truth is not None:
            clicked = segment_by_clicks(predictor, embedding, self.truth, self.clicks)
            scored = self._scored(clicked.segmented)
            by_click, best = clicked.ious.tolist(), clicked.best_of_three.tolist()
            scored = dataclasses.replace(scored, by_click=by_click, best_of_three=best)
            return clicked.segmented, scored
        prompts = self.prompts
        found = segment(predictor, embedding, prompts.boxes, prompts.scores, self.prompting)
        return found, self._scored(found)

    def _scored(self, found: Segmented) -> Scored:
        return score_picture(self.record, self.prompts, found, self.truth, self.areas)


def _truth(
    source: PromptSource, record: ImageRecord, count: int
) -> tuple[NDArray[np.bool_] | None, Sequence[float]]:
    """The first true masks of a picture and their areas; None and nothing without ground truth."""
    if not isinstance(source, GroundTruth):
        return None, ()
    return source.truth(record)[:count], source.areas(record)[:count]


def _compare(
    asked: _Asked, predictor: Predictor, reference: Predictor | None
) -> tuple[_Outcome, Picture]:
    """One picture by the model and, where there is one, by that to agree with."""
    record, image, prompts = asked.record, asked.image, asked.prompts
    segmented, scored = asked.of(predictor)
    if reference is None:
        picture = Picture(record, image, prompts, segmented, None, ious=scored.ious)
        return _Outcome(scored), picture
    expected, scored_expected = asked.of(reference)
    agreement = mask_ious(segmented.masks, expected.masks).tolist()
    picture = Picture(
        record, image, prompts, segmented, expected, agreement, scored.ious, scored_expected.ious
    )
    return _Outcome(scored, scored_expected, agreement), picture


def _summarize(
    dataset: ImageSet, outcomes: Sequence[_Outcome | None], score: bool, compared: bool
) -> Evaluation:
    """Scores of all pictures; None is one that was skipped."""
    evaluated = [outcome for outcome in outcomes if outcome is not None]
    if not evaluated:
        raise DataError("no picture is left to evaluate: all were skipped as damaged")
    parts = [outcome.model for outcome in evaluated if outcome.model is not None]
    references = [outcome.reference for outcome in evaluated if outcome.reference is not None]
    evaluation = Evaluation(
        pictures=len(evaluated), results=[result for part in parts for result in part.results]
    )
    evaluation.masks = len(evaluation.results)
    if not score:
        return evaluation
    if isinstance(dataset, CocoDataset) and has_truth(dataset):
        evaluation.evaluator = evaluator_of(dataset)
        evaluation.metrics = metrics_of(dataset, parts)
        if compared:
            evaluation.reference_metrics = metrics_of(dataset, references)
    if compared:
        agreement = [value for outcome in evaluated for value in outcome.agreement]
        evaluation.metrics["agreement"] = float(np.mean(agreement)) if agreement else float("nan")
    return evaluation


def metrics_of(dataset: ImageSet, parts: Sequence[Scored]) -> dict[str, float]:
    """Scores of the pictures of a data set: as `Evaluation.metrics`, without agreement."""
    scores = MaskScores(dataset)
    scores.results = [result for part in parts for result in part.results]
    metrics = scores.summarize()
    ious = [iou for part in parts for iou in part.ious]
    if ious:
        areas = [area for part in parts for area in part.areas]
        known = mean_iou_by_size(ious, areas) if areas else {"mean_iou": float(np.mean(ious))}
        metrics.update(known)
    predicted = [value for part in parts for value in part.predicted]
    if predicted:
        metrics["iou_error"] = float(np.mean(np.abs(np.subtract(predicted, ious))))
    by_click = np.array([row for part in parts for row in part.by_click])
    for number, column in enumerate(by_click.T, start=1):
        metrics[f"{AFTER_CLICK}{number}"] = float(column.mean())
    best = [iou for part in parts for iou in part.best_of_three]
    if best:
        metrics["mean_iou_best_of_three"] = float(np.mean(best))
    return metrics


def score_picture(
    record: ImageRecord,
    prompts: Prompts,
    segmented: Segmented,
    truth: NDArray[np.bool_] | None,
    areas: Sequence[float] = (),
) -> Scored:
    """What the masks of one picture add to the scores.

    Args:
        record: the picture.
        prompts: its boxes.
        segmented: a mask for each.
        truth: the true mask for each, bool [n, height, width], where prompts are ground truth.
        areas: of these objects, in pixels; without them the mean IoU is not told by size.
    """
    results = mask_results(record, segmented.masks, segmented.scores, prompts.category_ids)
    if truth is None:
        return Scored(results, [])
    ious = mask_ious(segmented.masks, truth).tolist()
    return Scored(results, ious, list(areas), segmented.predicted_ious.tolist())
