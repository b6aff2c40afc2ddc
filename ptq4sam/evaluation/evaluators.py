"""Who computes average precision: pycocotools, the reference, or faster-coco-eval.

The latter is used where it is installed. It gives the same numbers in C++, but for
2e-16 that pycocotools adds to what it divides by, and knows LVIS's rules, which pycocotools does
not.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ptq4sam.data.coco import CocoDataset, coco_index
from ptq4sam.data.federated import Federated
from ptq4sam.errors import DependencyError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

Kind = Literal["segm", "bbox"]
Evaluator = Literal["pycocotools", "faster-coco-eval"]

REFERENCE: Evaluator = "pycocotools"
FASTER: Evaluator = "faster-coco-eval"
EVALUATORS = (REFERENCE, FASTER)
LVIS_MOST = 300
"""Masks of a picture that LVIS counts, of all categories together."""

_STATISTICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR": 8}
_LVIS_STATISTICS = {
    **{"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75"},
    **{"APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"},
    **{"APr": "APr", "APc": "APc", "APf": "APf", "AR": "AR_all"},
}


def evaluator_of(dataset: CocoDataset, asked: Evaluator | None = None) -> Evaluator:
    """Who computes AP on a data set.

    Args:
        dataset: annotated pictures.
        asked: the one that is wanted; None for the fast one where it is installed.

    Raises:
        DependencyError: it is not installed, or LVIS's AP was asked of pycocotools.
    """
    installed = find_spec("faster_coco_eval") is not None
    if dataset.federated is not None and (asked == REFERENCE or not installed):
        raise DependencyError(
            f"{dataset.path} is annotated as LVIS, whose AP needs faster-coco-eval and not "
            "pycocotools: pip install 'ptq4sam[evaluation]'"
        )
    if asked == FASTER and not installed:
        raise DependencyError("faster-coco-eval is missing: pip install 'ptq4sam[evaluation]'")
    return asked or (FASTER if installed else REFERENCE)


def average_precision(
    dataset: CocoDataset, found: list[dict[str, Any]], kind: Kind, asked: Evaluator | None = None
) -> dict[str, float]:
    """AP and AR in percent of results with their areas; NaN where nothing is to be found.

    Args:
        dataset: annotated pictures, all of which count.
        found: results with "area" and "iscrowd".
        kind: of overlap.
        asked: as of `evaluator_of`.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR; on LVIS also APr, APc and APf of rare, common and
        frequent categories, by its rules: at most 300 results a picture, of all categories
        together; what is found of a category that was not looked for there does not count, and
        neither does what is too much of one that is not annotated exhaustively.

    Raises:
        DependencyError: as `evaluator_of`.
    """
    by = evaluator_of(dataset, asked)
    if dataset.federated is not None:
        counted = _looked_for(dataset, dataset.federated, _best(found, LVIS_MOST))
        statistics = _lvis(dataset, coco_index(dataset, counted), kind)
    elif by == FASTER:
        statistics = _faster(dataset, coco_index(dataset, found), kind)
    else:
        statistics = _reference(dataset, coco_index(dataset, found), kind)
    # Evaluators write -1 where there is nothing to find.
    return {name: 100 * v if v >= 0 else math.nan for name, v in statistics.items()}


def _reference(dataset: CocoDataset, found: COCO, kind: Kind) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset.ground_truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[place]) for name, place in _STATISTICS.items()}


def _faster(dataset: CocoDataset, found: COCO, kind: Kind) -> dict[str, float]:
    from faster_coco_eval import COCOeval_faster

    evaluation = COCOeval_faster(_own(dataset.ground_truth), _own(found), kind)
    evaluation.run()
    return {name: float(evaluation.stats[place]) for name, place in _STATISTICS.items()}


def _lvis(dataset: CocoDataset, found: COCO, kind: Kind) -> dict[str, float]:
    from faster_coco_eval import COCOeval_faster

    evaluation = COCOeval_faster(_own(dataset.ground_truth), _own(found), kind, lvis_style=True)
    evaluation.params.maxDets = [LVIS_MOST]
    evaluation.run()
    known = evaluation.stats_as_dict
    return {name: float(known[theirs]) for name, theirs in _LVIS_STATISTICS.items()}


def _own(index: COCO) -> Any:
    """The library's index of the same; it writes into annotations, so they are copies."""
    from faster_coco_eval import COCO as FasterCOCO

    content: dict[str, Any] = index.dataset
    return FasterCOCO({**content, "annotations": [{**one} for one in content["annotations"]]})


def _looked_for(
    dataset: CocoDataset, federated: Federated, found: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Results of categories that were looked for in their picture: of others nothing is known.

    faster-coco-eval leaves the others out too, but fails in a picture that has no more than these.
    """
    present = {
        (item["image_id"], item["category_id"])
        for item in dataset.ground_truth.dataset["annotations"]
    }
    return [
        one
        for one in found
        if (one["image_id"], one["category_id"]) in present
        or one["category_id"] in federated.absent.get(one["image_id"], ())
    ]


def _best(found: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The best results of each picture; faster-coco-eval's limit is one of each category."""
    by_picture: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in found:
        by_picture[result["image_id"]].append(result)
    ordered = (sorted(some, key=lambda one: -one["score"]) for some in by_picture.values())
    return [result for some in ordered for result in some[:most]]
