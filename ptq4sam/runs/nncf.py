"""The method nncf: a float SAM exported for OpenVINO, its encoder quantized by NNCF."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from ptq4sam.data import ImageSet
from ptq4sam.deploy.export import export_alone
from ptq4sam.deploy.exported import ExportedSam
from ptq4sam.deploy.manifest import Manifest
from ptq4sam.deploy.nncf_encoder import NncfSettings, NncfValidation, Pixels, quantize_encoder
from ptq4sam.deploy.targets.target import require
from ptq4sam.downloads import Missing
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation import mask_ious
from ptq4sam.evaluation.evaluate import require_truth, select
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import segment
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.locks import alone_in
from ptq4sam.prompts import GroundTruth
from ptq4sam.runs.needed import look_for_data, look_for_sam, look_for_validation
from ptq4sam.runs.settings import DEFAULT_MODEL, AccuracySettings, DataSettings
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NncfRequest:
    """One quantization by NNCF.

    Attributes:
        folder: receives the export.
        calibration: pictures; no boxes are needed.
        model: name of the SAM.
        checkpoint: float weights; None for the embedded ones.
        pictures: how many calibration pictures.
        accuracy: allowed drop of the mean IoU, and where it is measured; None for no control.
        prompting: how boxes prompt.
        skip_bad: skip damaged pictures.
    """

    folder: Path
    calibration: DataSettings
    model: str | None = None
    checkpoint: Path | None = None
    pictures: int = 32
    accuracy: AccuracySettings | None = None
    prompting: Prompting = field(default_factory=Prompting)
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.folder.suffix == ".safetensors" or self.folder.is_file():
            raise ConfigError(
                f"asked to write NNCF's model to {self.folder}: name a folder, for it is an "
                "OpenVINO export"
            )
        if self.pictures < 1:
            raise ConfigError(f"asked for {self.pictures} calibration pictures: use 1 or more")
        if self.accuracy is not None and self.accuracy.metric != "mean_iou":
            raise ConfigError("NNCF controls the mean IoU: ask for no other metric")
        if self.accuracy is not None and self.accuracy.images is None:
            raise ConfigError(
                "accuracy is measured on annotated pictures: give validation pictures and their "
                "annotations"
            )


def quantize_by_nncf(request: NncfRequest) -> Manifest:
    """Export a float SAM for OpenVINO and let NNCF quantize its encoder.

    Raises:
        ConfigError: validation pictures have no annotations.
        DataError: pictures cannot be read.
        DependencyError: OpenVINO or NNCF is not installed.
        MissingError: files are not there.
        StoreError: somebody else writes into the folder.
    """
    require("nncf", "openvino")
    _require_inputs(request)
    with alone_in(request.folder):
        return _quantize(request)


def _quantize(request: NncfRequest) -> Manifest:
    # Both before the work: a mistake should not show after minutes.
    validation = None if request.accuracy is None else _validation(request, request.accuracy)
    dataset = request.calibration.open(
        skip_bad=request.skip_bad, limit=request.pictures, masks=False
    )
    sam = load_sam(request.model or DEFAULT_MODEL, request.checkpoint)
    export_alone(sam, request.folder, "openvino")
    max_drop = None if request.accuracy is None else request.accuracy.max_drop
    manifest = quantize_encoder(
        request.folder, _Pixels(sam, dataset), NncfSettings(max_drop=max_drop), validation
    )
    _log.info("NNCF quantized the encoder in %s: %s", request.folder, manifest.nncf)
    return manifest


def _require_inputs(request: NncfRequest) -> None:
    missing = Missing()
    look_for_sam(missing, request.model, request.checkpoint)
    look_for_data(missing, request.calibration, "calibration ")
    look_for_validation(missing, request.accuracy)
    missing.report()


class _Pixels(Sequence[Pixels]):
    """Inputs of the encoder, read from pictures each time they are asked for."""

    def __init__(self, sam: Sam, dataset: ImageSet) -> None:
        self._predictor, self._dataset = Predictor(sam), dataset
        # Damaged pictures leave the data set when they are found.
        self._records = [
            record for record in dataset.images if dataset.load_or_skip(record) is not None
        ]

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pixels]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """The picture at a place, or those of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._predictor.pixels(self._dataset.load(self._records[index])).cpu().numpy()


def _validation(request: NncfRequest, accuracy: AccuracySettings) -> NncfValidation:
    if accuracy.images is None:
        raise ValueError("NncfRequest has validation pictures where it has an accuracy")
    opened = DataSettings(accuracy.images, accuracy.annotations).open(
        skip_bad=request.skip_bad, limit=accuracy.limit
    )
    dataset = require_truth(opened, accuracy.annotations)
    source = GroundTruth(dataset)
    records = [
        record
        for record in dataset.annotated_images()
        if (image := dataset.load_or_skip(record)) is not None
        and len(source.prompts(record, image)) > 0
    ]

    def score(model: ExportedSam, places: Sequence[int]) -> list[float]:
        predictor, scores = Predictor(model), []
        for place in places:
            record = records[place]
            image = dataset.load(record)
            prompts = select(source.prompts(record, image), request.prompting)
            embedding = predictor.embed(image)
            found = segment(predictor, embedding, prompts.boxes, prompts.scores, request.prompting)
            truth = source.truth(record)[: len(prompts)]
            scores.append(float(np.mean(mask_ious(found.masks, truth))))
        return scores

    return NncfValidation(len(records), score)
