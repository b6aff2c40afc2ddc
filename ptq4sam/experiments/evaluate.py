"""Score a SAM on a data set: mask AP, mean IoU, agreement with the float model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data import CocoDataset, ImageRecord, ImageSet
from ptq4sam.errors import DataError
from ptq4sam.evaluation import MaskScores, mask_ious
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import Segmented, segment
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import GroundTruth, Prompts, PromptSource
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor


@dataclass(frozen=True)
class Picture:
    """One evaluated picture, for whoever wants to draw or keep it.

    Attributes:
        record: the picture's entry in the data set.
        image: RGB uint8 [height, width, 3].
        prompts: boxes that were used.
        segmented: masks of the evaluated model.
        reference: masks of the float model, or None.
    """

    record: ImageRecord
    image: NDArray[np.uint8]
    prompts: Prompts
    segmented: Segmented
    reference: Segmented | None


@dataclass
class Evaluation:
    """Scores of one model, with those of the float model for the same prompts.

    Attributes:
        metrics: AP, AP50, AP75, APs, APm, APl, AR in percent; mean_iou where prompts are ground
            truth; agreement where there is a float model to agree with. Without annotations only
            agreement.
        reference_metrics: the same of the float model.
        results: the masks as COCO results.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    reference_metrics: dict[str, float] = field(default_factory=dict)
    results: list[dict[str, object]] = field(default_factory=list)
    pictures: int = 0
    masks: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class _Scorer:
    """Collects the scores of one model over a data set."""

    def __init__(self, dataset: ImageSet) -> None:
        self._scores = MaskScores(dataset)
        self._ious: list[float] = []

    def add(self, record: ImageRecord, prompts: Prompts, segmented: Segmented) -> None:
        self._scores.add(record, segmented.masks, segmented.scores, prompts.category_ids)

    def add_truth(self, truth: NDArray[np.bool_], segmented: Segmented) -> None:
        self._ious.extend(mask_ious(segmented.masks, truth).tolist())

    def metrics(self) -> dict[str, float]:
        result = self._scores.summarize()
        if self._ious:
            result["mean_iou"] = float(np.mean(self._ious))
        return result

    @property
    def results(self) -> list[dict[str, object]]:
        return self._scores.results


def select(prompts: Prompts, prompting: Prompting) -> Prompts:
    """The boxes that are used: above the threshold, at most so many, highest scores first."""
    return prompts.above(prompting.score_threshold).first(prompting.max_per_image)


def has_truth(dataset: ImageSet) -> bool:
    """Whether masks on a data set can be scored."""
    return isinstance(dataset, CocoDataset) and bool(dataset.annotated_images())


def evaluate_sam(
    sam: Sam,
    dataset: ImageSet,
    source: PromptSource,
    prompting: Prompting,
    *,
    reference: Sam | None = None,
    progress: Progress = silent,
    on_picture: Callable[[Picture], None] | None = None,
    score: bool = True,
) -> Evaluation:
    """Prompt a SAM with boxes on every picture and score its masks.

    A picture without boxes is not encoded; its missed objects still count. A damaged picture that
    the data set is told to skip does not count at all.

    Args:
        sam: the model, float or quantized.
        dataset: pictures and, for scores, their truth.
        source: where boxes come from.
        prompting: how boxes prompt and how masks are scored.
        reference: the float model, to measure agreement (mean IoU of masks for the same boxes).
        progress: shows how far it is.
        on_picture: called with each evaluated picture.
        score: compute metrics; else only collect the masks.

    Raises:
        DataError: a picture is damaged and not to be skipped, or none is left.
    """
    evaluation = Evaluation()
    scorer, reference_scorer = _Scorer(dataset), _Scorer(dataset)
    agreement: list[float] = []
    predictor = Predictor(sam)
    reference_predictor = Predictor(reference) if reference is not None else None
    for record in progress(dataset.images, "segmenting"):
        image = dataset.load_or_skip(record)
        if image is None:
            continue
        prompts = select(source.prompts(record, image), prompting)
        evaluation.pictures += 1
        if len(prompts.boxes) == 0:
            continue
        # Annotated boxes all score 1, so that what `select` leaves are the first ones.
        truth = source.truth(record)[: len(prompts)] if isinstance(source, GroundTruth) else None
        segmented = _segment(predictor, image, prompts, prompting)
        scorer.add(record, prompts, segmented)
        if truth is not None:
            scorer.add_truth(truth, segmented)
        evaluation.masks += len(segmented.masks)
        expected = None
        if reference_predictor is not None:
            expected = _segment(reference_predictor, image, prompts, prompting)
            reference_scorer.add(record, prompts, expected)
            if truth is not None:
                reference_scorer.add_truth(truth, expected)
            agreement.extend(mask_ious(segmented.masks, expected.masks).tolist())
        if on_picture is not None:
            on_picture(Picture(record, image, prompts, segmented, expected))
    if evaluation.pictures == 0:
        raise DataError("no picture is left to evaluate: all were skipped as damaged")
    evaluation.results = scorer.results
    if not score:
        return evaluation
    if has_truth(dataset):
        evaluation.metrics = scorer.metrics()
        if reference is not None:
            evaluation.reference_metrics = reference_scorer.metrics()
    if reference is not None:
        evaluation.metrics["agreement"] = float(np.mean(agreement)) if agreement else float("nan")
    return evaluation


def _segment(
    predictor: Predictor, image: NDArray[np.uint8], prompts: Prompts, prompting: Prompting
) -> Segmented:
    embedding = predictor.embed(image)
    return segment(predictor, embedding, prompts.boxes, prompts.scores, prompting)
