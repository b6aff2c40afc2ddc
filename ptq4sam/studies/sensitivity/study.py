"""Each target alone, and all but it: on one picture after another, from the state before it.

A picture runs once through the float and once through the quantized model. Before the first unit
that a target belongs to either state is a copy of the whole model's, so that only what follows is
run with the target's quantizers alone, or with all others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq4sam import parallel
from ptq4sam.data import CocoDataset, ImageRecord, ImageSet
from ptq4sam.errors import DataError
from ptq4sam.evaluation import mask_ious
from ptq4sam.evaluation.evaluate import Scored, has_truth, metrics_of, score_picture, select
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import Segmented, segment
from ptq4sam.model.insertion import ENCODER, QuantizedSam
from ptq4sam.model.switches import Switches
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import GroundTruth, Prompts, PromptSource
from ptq4sam.runs.measurements import Measurements
from ptq4sam.sam.model import Features, Sam
from ptq4sam.sam.predictor import ImageEmbedding, Predictor
from ptq4sam.sam.stages import Stage, State, run_stages
from ptq4sam.studies.sensitivity.effects import Effect, PictureEffect, Power, add_up
from ptq4sam.studies.sensitivity.targets import Target
from ptq4sam.threads import suited_to

FLOAT, QUANTIZED, ONLY, ALL_BUT = "float", "quantized", "only", "all but"
"""What is measured: the whole models, a target alone, and all but it."""

Key = tuple[str, str]
"""One of ONLY and ALL_BUT with a target's name, or of FLOAT and QUANTIZED with nothing."""


@dataclass
class Study:
    """A frozen model, the float one that it was made of, and pictures to compare them on.

    Attributes:
        sam: the model.
        float_sam: the float model.
        dataset: the pictures.
        source: boxes on them.
        prompting: how boxes prompt.
        measurements: keeps what was measured.
        progress: shows how far it is.
    """

    sam: QuantizedSam
    float_sam: Sam
    dataset: ImageSet
    source: PromptSource
    prompting: Prompting
    measurements: Measurements
    progress: Progress = silent

    def __post_init__(self) -> None:
        self._switches = Switches(self.sam, self.float_sam)
        self._predictor = Predictor(self.sam)
        self._chosen: dict[int, list[ImageRecord]] = {}

    def effects(
        self,
        targets: Sequence[Target],
        pictures: int,
        name: str,
        *,
        kinds: Sequence[str] = (ONLY, ALL_BUT),
        scored: bool = False,
    ) -> dict[Key, Effect]:
        """What each target does on the first pictures that have boxes.

        Of several processes the first one measures.

        Args:
            targets: what is switched.
            pictures: how many pictures.
            name: tells this measurement from others.
            kinds: ONLY, ALL_BUT or both.
            scored: measure the AP too, where there is a truth.

        Returns:
            Also of the float and the quantized model as a whole.

        Raises:
            DataError: no picture has a box.
        """
        chosen = self.with_boxes(pictures)
        parts: dict[Key, list[PictureEffect]] = {}
        for record in self.progress(chosen, name):
            with suited_to(self.sam):
                measured = self.measurements.value(
                    f"{name}: picture {record.id}",
                    functools.partial(
                        parallel.from_first,
                        functools.partial(self._picture, targets, record, kinds, scored),
                    ),
                )
            for kind, target, effect in measured:
                parts.setdefault((kind, target), []).append(PictureEffect(**effect))
        return {
            key: add_up(found, self._ap(found, chosen) if scored else None)
            for key, found in parts.items()
        }

    def with_boxes(self, pictures: int) -> list[ImageRecord]:
        """The first pictures that can be read and have boxes, as many or all there are.

        Raises:
            DataError: no picture has a box.
        """
        if pictures in self._chosen:
            return self._chosen[pictures]
        chosen: list[ImageRecord] = []
        for record in self.dataset.images:
            if len(chosen) == pictures:
                break
            image = self.dataset.load_or_skip(record)
            if image is not None and len(self._prompts(record, image).boxes):
                chosen.append(record)
        if not chosen:
            raise DataError(f"{self.source.name} gave no box on any picture: nothing to measure on")
        self._chosen[pictures] = chosen
        return chosen

    def _prompts(self, record: ImageRecord, image: NDArray[np.uint8]) -> Prompts:
        return select(self.source.prompts(record, image), self.prompting)

    def _ap(self, found: Sequence[PictureEffect], chosen: Sequence[ImageRecord]) -> float | None:
        if not isinstance(self.dataset, CocoDataset) or not has_truth(self.dataset):
            return None
        scores = [Scored(picture.results, picture.ious) for picture in found]
        return metrics_of(self.dataset.subset(chosen), scores)["AP"]

    @torch.no_grad()
    def _picture(
        self, targets: Sequence[Target], record: ImageRecord, kinds: Sequence[str], scored: bool
    ) -> list[tuple[str, str, dict[str, Any]]]:
        """What one picture shows."""
        image = self.dataset.load(record)
        prompts = self._prompts(record, image)
        areas: list[float] = []
        truth = None
        if isinstance(self.source, GroundTruth):
            truth = self.source.truth(record)[: len(prompts)]
            areas = self.source.areas(record)[: len(prompts)]
        size = (image.shape[0], image.shape[1])
        outputs = self._outputs(image, prompts, targets, kinds)
        _, exact, expected = next(outputs)
        found: list[tuple[str, str, dict[str, Any]]] = []

        def keep(key: Key, features: Tensor, segmented: Segmented) -> None:
            part = score_picture(record, prompts, segmented, truth)
            effect = PictureEffect(
                dataclasses.astuple(Power.of(exact, features)),
                dataclasses.astuple(
                    Power.of(self._seen(expected, size), self._seen(segmented, size))
                ),
                part.ious,
                areas,
                mask_ious(segmented.masks, expected.masks).tolist(),
                part.results if scored else [],
            )
            found.append((*key, dataclasses.asdict(effect)))

        keep((FLOAT, ""), exact, expected)
        for key, features, segmented in outputs:
            keep(key, features, segmented)
        return found

    def _seen(self, segmented: Segmented, size: tuple[int, int]) -> Tensor:
        """Logits where the picture is: those of its padding mean nothing."""
        logits = segmented.logits
        geometry = self.sam.geometry
        rows, columns = (
            -(-length * logits.shape[-1] // geometry.prompt_side)
            for length in geometry.placed(size)
        )
        return logits[:, :rows, :columns]

    def _outputs(
        self,
        image: NDArray[np.uint8],
        prompts: Prompts,
        targets: Sequence[Target],
        kinds: Sequence[str],
    ) -> Iterator[tuple[Key, Tensor, Segmented]]:
        """Embedding and masks: float, quantized, then of every target."""
        size = (image.shape[0], image.shape[1])
        every = self._switches.names

        def segmented(features: Features) -> Segmented:
            embedding = ImageEmbedding.of(features, size, self.sam.geometry)
            return segment(
                self._predictor, embedding, prompts.boxes, prompts.scores, self.prompting
            )

        def run(names: frozenset[str], stages: Sequence[Stage], state: State) -> State:
            with self._switches.only(names):
                return run_stages(stages, state)

        def masks(
            key: Key, names: frozenset[str], features: Features
        ) -> tuple[Key, Tensor, Segmented]:
            with self._switches.only(names):
                return key, features[0], segmented(features)

        stages = self.sam.image_encoder.stages()
        begin = self.sam.image_encoder.begin(self._predictor.pixels(image))
        nothing: frozenset[str] = frozenset()
        exact = run(nothing, stages, begin)
        yield masks((FLOAT, ""), nothing, exact)
        quantized = run(every, stages, begin) if ALL_BUT in kinds else begin
        if ALL_BUT in kinds:
            yield masks((QUANTIZED, ""), every, quantized)
        by_unit: dict[str, list[Target]] = {}
        for target in targets:
            by_unit.setdefault(target.first_unit, []).append(target)
        # What is on in each kind, given a target, and the state that it starts from.
        bases: Mapping[str, frozenset[str]] = {ONLY: nothing, ALL_BUT: every}
        states: dict[str, State] = dict.fromkeys(kinds, begin)
        for place, stage in enumerate(stages):
            for target in by_unit.pop(f"{ENCODER}.{stage.name}", ()):
                for kind in kinds:
                    names = bases[kind] ^ target.quantizers
                    features = run(names, stages[place:], states[kind])
                    yield masks((kind, target.name), names, features)
            states = {kind: run(bases[kind], [stage], state) for kind, state in states.items()}
        for behind in by_unit.values():
            for target in behind:
                for kind in kinds:
                    names = bases[kind] ^ target.quantizers
                    yield masks((kind, target.name), names, states[kind])
