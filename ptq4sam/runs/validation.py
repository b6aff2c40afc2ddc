"""How good a model is on a validation set, in percent, and what single units do to it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam import parallel
from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.evaluation.evaluate import (
    Scored,
    evaluate_sam,
    metrics_of,
    score_picture,
    select,
)
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import Segmented, segment
from ptq4sam.model.cache import ActivationCache, Kept, load_all
from ptq4sam.model.exchange import exchanged
from ptq4sam.model.insertion import ENCODER, QuantizedSam
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import GroundTruth, Prompts, PromptSource
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.settings import Metric
from ptq4sam.sam.model import Features, Sam
from ptq4sam.sam.predictor import ImageEmbedding, Predictor
from ptq4sam.sam.stages import run_stages
from ptq4sam.threads import suited_to

_NOTHING = ""
"""In place of a unit's path: nothing is exchanged."""


@dataclasses.dataclass
class Validation:
    """A validation set and what is measured on it.

    Attributes:
        dataset: annotated pictures.
        source: boxes; for the mean IoU those of the annotations.
        prompting: how boxes prompt.
        metric: "mean_iou" or "AP"; both are in percent here.
        cache: keeps embeddings between models with one encoder.
        progress: shows how far it is.
    """

    dataset: CocoDataset
    source: PromptSource
    prompting: Prompting
    metric: Metric
    cache: ActivationCache
    progress: Progress = silent
    _embeddings: dict[bytes, tuple[Kept, ...]] = dataclasses.field(default_factory=dict)
    _encoder: str = ""

    def score(self, sam: Sam, encoder: str) -> float:
        """The score of a model.

        Args:
            sam: the model.
            encoder: tells its encoder from others; one that was scored last is not run again.
        """
        if encoder != self._encoder:
            self._embeddings.clear()
            self._encoder = encoder
        model = _EncodingOnce(sam, self._embeddings, self.cache)
        # Sums of float units depend on how many threads add.
        with suited_to(sam):
            found = evaluate_sam(
                model, self.dataset, self.source, self.prompting, progress=self.progress
            )
        return 100 * found.metrics["mean_iou"] if self.metric == "mean_iou" else found.metrics["AP"]

    def gains_of_changes(
        self,
        sam: QuantizedSam,
        units: Mapping[str, Mapping[str, nn.Module]],
        pictures: int,
        measurements: Measurements,
        name: str,
    ) -> dict[str, float]:
        """What a model gains by one of its units exchanged, for each, on the first pictures.

        A picture runs up to each unit once: what the unit changes is run from there. Of several
        processes the first one does it.

        Args:
            sam: the model.
            units: by path of the other unit, what goes into the model with it, by its path
                (`exchange.units_with_norms`).
            pictures: how many pictures.
            measurements: keeps what was measured of each picture.
            name: tells this model and these units from others, for `measurements`.
        """
        chosen: list[ImageRecord] = []
        parts: dict[str, list[Scored]] = {unit: [] for unit in (_NOTHING, *units)}
        for record in self.progress(self.dataset.images, "measuring units"):
            if len(chosen) == pictures:
                break
            changes = measurements.value(
                f"{name}: picture {record.id}",
                functools.partial(
                    parallel.from_first, functools.partial(self._changes, sam, units, record)
                ),
            )
            if changes:
                chosen.append(record)
            for unit, scored in changes.items():
                parts[unit].append(Scored(**scored))
        before = self._score_of(parts.pop(_NOTHING), chosen)
        return {unit: self._score_of(found, chosen) - before for unit, found in parts.items()}

    @torch.no_grad()
    def _changes(
        self,
        sam: QuantizedSam,
        units: Mapping[str, Mapping[str, nn.Module]],
        record: ImageRecord,
    ) -> dict[str, dict[str, Any]]:
        """What one picture adds to the scores of each change and none; nothing without boxes."""
        image = self.dataset.load_or_skip(record)
        if image is None:
            return {}
        prompts = select(self.source.prompts(record, image), self.prompting)
        if len(prompts.boxes) == 0:
            return {}
        truth = None
        if isinstance(self.source, GroundTruth):
            truth = self.source.truth(record)[: len(prompts)]
        changes = {}
        with suited_to(sam):
            for unit, segmented in self._masks_of_changes(sam, units, image, prompts):
                scored = score_picture(record, prompts, segmented, truth)
                # Masks are what AP needs, and the mean IoU does not.
                results = scored.results if self.metric == "AP" else []
                changes[unit] = {"results": results, "ious": scored.ious}
        return changes

    def _masks_of_changes(
        self,
        sam: QuantizedSam,
        units: Mapping[str, Mapping[str, nn.Module]],
        image: NDArray[np.uint8],
        prompts: Prompts,
    ) -> Iterator[tuple[str, Segmented]]:
        predictor = Predictor(sam)

        def segmented(features: Features) -> Segmented:
            size = (image.shape[0], image.shape[1])
            embedding = ImageEmbedding.of(features, size, sam.geometry)
            return segment(predictor, embedding, prompts.boxes, prompts.scores, self.prompting)

        stages = sam.image_encoder.stages()
        state = sam.image_encoder.begin(predictor.pixels(image))
        for place, stage in enumerate(stages):
            name = f"{ENCODER}.{stage.name}"
            if name in units:
                with exchanged(sam, units[name]):
                    changed = sam.image_encoder.stages()[place].run(state)
                yield name, segmented(run_stages(stages[place + 1 :], changed))
            state = stage.run(state)
        yield _NOTHING, segmented(state)
        for name, modules in units.items():
            if not name.startswith(f"{ENCODER}."):
                with exchanged(sam, modules):
                    yield name, segmented(state)

    def _score_of(self, parts: Sequence[Scored], pictures: Sequence[ImageRecord]) -> float:
        if self.metric == "mean_iou":
            return 100 * float(np.mean([iou for part in parts for iou in part.ious]))
        return metrics_of(self.dataset.subset(pictures), parts)["AP"]


class _EncodingOnce:
    """A SAM that remembers the embeddings of its pictures; give it to `evaluate_sam`."""

    def __init__(
        self, sam: Sam, embeddings: dict[bytes, tuple[Kept, ...]], cache: ActivationCache
    ) -> None:
        self._sam, self._embeddings, self._cache = sam, embeddings, cache
        self.name, self.geometry, self.device = sam.name, sam.geometry, sam.device
        self.mask_input_size, self.embedding_bytes = sam.mask_input_size, sam.embedding_bytes
        self.preprocess, self.postprocess_masks = sam.preprocess, sam.postprocess_masks
        self.decode = sam.decode

    def embed(self, pixels: Tensor) -> Features:
        """As `Sam.embed`, run once for each picture."""
        picture = hashlib.sha256(pixels.cpu().contiguous().numpy().data).digest()
        if picture not in self._embeddings:
            self._embeddings[picture] = self._cache.keep(self._sam.embed(pixels))
        return load_all(self._embeddings[picture])
