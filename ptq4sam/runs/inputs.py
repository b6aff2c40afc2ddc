"""The pictures of a run and the boxes on them: to evaluate, to calibrate on, to validate with."""

from __future__ import annotations

import logging

from ptq4sam.data import CocoDataset, ImageSet
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.evaluate import has_truth, require_truth
from ptq4sam.prompts import CacheFolders, PromptSource, cached, open_prompts
from ptq4sam.prompts.spec import is_boxes_file, parse_spec
from ptq4sam.runs.calibration import CalibrationPictures, calibration_pictures, order_seed
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.settings import DataSettings, RunSettings
from ptq4sam.runs.validation import Validation
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)


class Inputs:
    """Opens the data sets that a run names, each with its boxes."""

    def __init__(self, context: RunContext) -> None:
        self._context, self._settings = context, context.settings
        own = self._settings.cache_dir
        # One for all data sets of the run, which is told once where nothing can be kept.
        self._kept = CacheFolders(own) if own else CacheFolders.beside(self._settings.work_dir)

    def evaluated(self) -> tuple[ImageSet, PromptSource] | None:
        """What is evaluated, and its boxes; None where the run only quantizes.

        Raises:
            ConfigError: boxes are to come from annotations that there are none of.
            DataError: pictures or annotations cannot be used.
        """
        settings = self._settings
        if settings.data is None:
            return None
        with self._context.phases.phase("data"):
            dataset, source = self._opened(settings.data, settings.limit, settings.prompts)
        if settings.score and not has_truth(dataset):
            _log.warning(
                "%s has no annotations: masks are written, but not scored", settings.data.images
            )
        return dataset, source

    def calibration(self, sam: Sam) -> CalibrationPictures:
        """The pictures that a model is calibrated on; errors as `evaluated`.

        Raises:
            CalibrationError: no picture has boxes.
        """
        settings = self._settings
        if settings.scheme is None or settings.calibration is None:
            raise ValueError("RunSettings has a scheme and calibration data, or neither")
        prompts = calibration_prompts(settings)
        size, prompting = settings.scheme.calibrate, settings.prompting
        seed = order_seed(settings.scheme, settings.seed)
        with self._context.phases.phase("calibration boxes"):
            dataset, source = self._opened(
                settings.calibration, None, prompts, masks=False, enough=size
            )
            key = (settings.float_model, settings.checkpoint, sam.device, settings.calibration)
            return self._context.opened.get(
                "calibration pictures",
                (*key, settings.skip_bad, prompts, size, prompting, seed),
                lambda: calibration_pictures(
                    sam, dataset, source, size, prompting, self._context.progress, seed
                ),
            )

    def validation(self) -> Validation | None:
        """Where accuracy is controlled, if it is; errors as `evaluated`.

        Raises:
            ConfigError: the pictures have no annotations.
        """
        settings, accuracy = self._settings, self._settings.accuracy
        if accuracy is None:
            return None
        evaluated = accuracy.images is None
        pair = settings.data if accuracy.images is None else DataSettings(accuracy.images)
        if pair is None:
            raise ValueError("AccuracySettings has pictures, or the run evaluates some")
        annotations = pair.annotations if evaluated else accuracy.annotations
        with self._context.phases.phase("validation data"):
            limit = accuracy.limit or (settings.limit if evaluated else None)
            prompts = "ground-truth" if accuracy.metric == "mean_iou" else settings.prompts
            if parse_spec(prompts).kind == "clicks":
                raise ConfigError(
                    "accuracy control by AP prompts with boxes, not clicks: use other prompts"
                )
            data = DataSettings(pair.images, annotations)
            dataset = require_truth(self._dataset(data, limit), annotations)
            source = self._source(prompts, dataset)
        return Validation(
            dataset,
            source,
            settings.prompting,
            accuracy.metric,
            self._context.cache,
            self._context.progress,
        )

    def _opened(
        self,
        data: DataSettings,
        limit: int | None,
        prompts: str,
        masks: bool = True,
        enough: int | None = None,
    ) -> tuple[ImageSet, PromptSource]:
        """A data set, with or without a need of masks and of all its pictures, and its boxes."""

        def open_both() -> tuple[ImageSet, PromptSource]:
            dataset = self._dataset(data, limit, masks, enough)
            return dataset, self._source(prompts, dataset)

        key = (data, limit, prompts, masks, enough, self._settings.skip_bad, self._context.device)
        return self._context.opened.get("pictures", key, open_both)

    def _dataset(
        self,
        data: DataSettings,
        limit: int | None,
        masks: bool = True,
        enough: int | None = None,
    ) -> ImageSet:
        skip_bad = self._settings.skip_bad
        return data.open(skip_bad=skip_bad, limit=limit, masks=masks, enough=enough)

    def _source(self, prompts: str, dataset: ImageSet) -> PromptSource:
        kind = parse_spec(prompts).kind
        if kind in ("ground-truth", "clicks") and not has_truth(dataset):
            found = "without annotations"
            if isinstance(dataset, CocoDataset):
                found = f"of which {dataset.path} annotates none"
            raise ConfigError(
                f"asked for prompts {prompts} on pictures {found}: give annotations (masks.json of "
                "ptq4sam everything are some), or boxes.json, onnx:FILE or another detector for "
                "prompts"
            )
        source = open_prompts(prompts, dataset, device=self._context.device)
        return cached(source, dataset, self._kept)


def calibration_prompts(settings: RunSettings) -> str:
    """The prompt source of the calibration pictures."""
    if settings.calibration_prompts is not None:
        return settings.calibration_prompts
    if is_boxes_file(settings.prompts):
        _log.info("calibrating with ground-truth boxes: %s is for other pictures", settings.prompts)
        return "ground-truth"
    if parse_spec(settings.prompts).kind == "clicks":
        _log.info("calibrating with ground-truth boxes, evaluating with clicks")
        return "ground-truth"
    return settings.prompts
