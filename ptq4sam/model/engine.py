"""Reconstruct a calibrated model unit by unit, each from what the unit before it left behind."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.methods.reconstruction import UnitData, reconstruct_unit
from ptq4sam.model.cache import ActivationCache, Kept, KeptSequence, load_all
from ptq4sam.model.calibration import CalibrationItem, box_groups
from ptq4sam.model.capture import capture_call
from ptq4sam.model.insertion import ENCODER, TRANSFORMER, QuantizedSam
from ptq4sam.model.journal import Journal
from ptq4sam.model.plan import Plan
from ptq4sam.model.prompt_aware import BOXES, PromptAware
from ptq4sam.model.published import keep_defects
from ptq4sam.operators.base import quantized_layers, weight_quantizers
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.recon import Reconstruction
from ptq4sam.sam.model import Features
from ptq4sam.sam.stages import Stage
from ptq4sam.sizes import format_seconds

_log = logging.getLogger(__name__)

KeptState = tuple[Kept, ...]

_MANY = 1 / 3
"""Share of the units from which on it is worth a warning that learning made them worse."""


@dataclass
class _Streams:
    """What flows between units in the quantized and in the float model.

    One entry a picture in the encoder, one a group of boxes in the decoder.
    """

    quantized: list[KeptState]
    exact: list[KeptState]


@dataclass(frozen=True)
class _Captured:
    """What a module saw and should give, one entry as in `_Streams`."""

    inputs: list[KeptState]
    exact_inputs: list[KeptState]
    targets: list[KeptState]

    def data(self) -> UnitData:
        return UnitData(*map(KeptSequence, (self.inputs, self.exact_inputs, self.targets)))


def reconstruct(
    sam: QuantizedSam,
    items: Sequence[CalibrationItem],
    settings: Reconstruction,
    *,
    seed: int = 0,
    progress: Progress = silent,
    cache: ActivationCache | None = None,
    journal: Journal | None = None,
    plan: Plan | None = None,
) -> None:
    """Reconstruct every unit of a calibrated model in execution order.

    Each unit runs on from the cached output of the one before it: every unit sees every picture a
    fixed number of times, however deep the network is. The float targets come from the same model
    with its quantizers off, so that signs folded by bimodal integration are in both.

    Args:
        sam: the model; it is left with hard rounding.
        items: calibration pictures.
        settings: the scheme's `recon` section.
        seed: fixes every random choice, unit by unit.
        progress: shows how far it is.
        cache: where activations live; one of the default budget by default.
        journal: keeps what is finished; units it has are read, not learned.
        plan: tells which share of the work is done.

    Raises:
        CalibrationError: a picture is not finite, or a unit diverged.
        ResourceError: activations fit nowhere.
    """
    cache = ActivationCache(sam.device) if cache is None else cache
    work = _Work(sam, settings, seed, progress, cache, journal, plan)
    if sam.encoder_quantized:
        begun = [work.patches(number, item) for number, item in enumerate(items)]
        streams = _Streams(begun, list(begun))
        work.judge_by_masks(begun[0], [item.boxes[:BOXES] for item in items])
        work.run_part(ENCODER, sam.image_encoder.stages(), streams)
    else:
        features = [cache.keep(work.exact_features(item)) for item in items]
        streams = _Streams(features, list(features))
        work.judge_by_masks()
    boxes = [item.boxes for item in items]
    exact = work.decoder_states(streams.exact, boxes)
    # Behind a float encoder both models are one, and their states are kept once.
    quantized = (
        work.decoder_states(streams.quantized, boxes) if sam.encoder_quantized else list(exact)
    )
    streams = _Streams(quantized, exact)
    joint = settings.granularity == "joint"
    work.run_part(TRANSFORMER, sam.transformer.stages(joint=joint), streams)
    work.warn_of_worse_units()


@dataclass
class _Work:
    sam: QuantizedSam
    settings: Reconstruction
    seed: int
    progress: Progress
    cache: ActivationCache
    journal: Journal | None
    plan: Plan | None
    units_done: int = 0
    modules_done: int = 0
    learning: float = 0.0
    restored: int = 0
    worse: list[str] = field(default_factory=list)
    judges: PromptAware | None = None
    boxes: list[KeptState] = field(default_factory=list)

    def judge_by_masks(self, first: KeptState | None = None, boxes: Sequence[Tensor] = ()) -> None:
        """Let units learn by what masks are made of, where the settings say so.

        Args:
            first: state before the encoder on a picture; None where that is not quantized.
            boxes: of the pictures.
        """
        if self.settings.loss == "prompt-aware":
            self.judges = PromptAware(self.sam, None if first is None else load_all(first))
            self.boxes = [self.cache.keep((each.to(self.sam.device),)) for each in boxes]

    @torch.no_grad()
    def patches(self, number: int, item: CalibrationItem) -> KeptState:
        # The portable embedding cuts pixels off: nothing behind it would show what they were.
        if not item.pixels.isfinite().all():
            raise CalibrationError(
                f"calibration picture {number} has pixels that are not finite: check it"
            )
        return self.cache.keep(self.sam.image_encoder.begin(item.pixels.to(self.sam.device)))

    @torch.no_grad()
    def exact_features(self, item: CalibrationItem) -> Features:
        return self.sam.embed(item.pixels.to(self.sam.device))

    @torch.no_grad()
    def decoder_states(
        self, features: Sequence[KeptState], boxes: Sequence[Tensor]
    ) -> list[KeptState]:
        """States before the decoder's transformer, one for each group of boxes of a picture."""
        sam, states = self.sam, []
        positions = sam.prompt_encoder.dense_positions()
        for kept, picture_boxes in zip(features, boxes, strict=True):
            embedding, *_ = load_all(kept)
            for group in box_groups(picture_boxes):
                sparse, dense = sam.prompt_encoder(boxes=group.to(sam.device))
                begun = sam.mask_decoder.begin(embedding, positions, sparse, dense)
                states.append(self.cache.keep(begun))
        return states

    def run_part(self, path: str, stages: Sequence[Stage], streams: _Streams) -> None:
        """Reconstruct the stages of a part one after the other; the streams end behind it."""
        for stage in stages:
            with self._activations():
                judged = self._judged(path, stage, streams)
                captured = self._capture(stage, streams)
                for name, module, data in judged or self._split(stage, captured):
                    self._finish(f"{path}.{name}", module, data)
                self._advance(stage, captured.inputs, streams)
            self.units_done += 1
            self._tell_time_left()

    @torch.no_grad()
    def _capture(self, stage: Stage, streams: _Streams) -> _Captured:
        """Inputs of both models and the float answer; the float stream moves on."""
        captured = _Captured([], [], [])
        for index, (kept, kept_exact) in enumerate(
            zip(streams.quantized, streams.exact, strict=True)
        ):
            exact = load_all(kept_exact)
            arguments = stage.enter(exact)
            with quantizer_mode(stage.unit, Mode.FLOAT):
                target = stage.unit(*arguments)
            known = list(zip(exact, kept_exact, strict=True))
            captured.exact_inputs.append(self.cache.keep(arguments, known))
            captured.targets.append(self.cache.keep((target,)))
            streams.exact[index] = self.cache.keep(stage.leave(exact, target), known)
            if kept == kept_exact:
                captured.inputs.append(captured.exact_inputs[-1])
            else:
                state = load_all(kept)
                known = list(zip(state, kept, strict=True))
                captured.inputs.append(self.cache.keep(stage.enter(state), known))
        return captured

    @torch.no_grad()
    def _advance(self, stage: Stage, inputs: Sequence[KeptState], streams: _Streams) -> None:
        """The quantized stream moves on, with the unit as it is now."""
        for index, (kept, arguments) in enumerate(zip(streams.quantized, inputs, strict=True)):
            state = load_all(kept)
            after = stage.leave(state, stage.unit(*load_all(arguments)))
            streams.quantized[index] = self.cache.keep(after, list(zip(state, kept, strict=True)))

    @torch.no_grad()
    def _judged(
        self, path: str, stage: Stage, streams: _Streams
    ) -> list[tuple[str, nn.Module, UnitData]]:
        """A unit that learns by what masks are made of, with what it sees; none of another."""
        judged = None if self.judges is None else self.judges.judged(path, stage)
        if judged is None or not quantized_layers(stage.unit):
            return []
        boxes = self.boxes if path == ENCODER else [()] * len(streams.exact)
        data = _Captured([], [], [])
        for kept, kept_exact, more in zip(streams.quantized, streams.exact, boxes, strict=True):
            data.inputs.append(kept + more)
            data.exact_inputs.append(kept_exact + more)
            with quantizer_mode(stage.unit, Mode.FLOAT):
                target = judged(*load_all(kept_exact + more))
            data.targets.append(self.cache.keep((target,)))
        return [(stage.name, judged, data.data())]

    def _split(
        self, stage: Stage, captured: _Captured
    ) -> Iterator[tuple[str, nn.Module, UnitData]]:
        """The unit itself, or its layers one after the other, with what each saw."""
        if not quantized_layers(stage.unit):
            return  # the scheme keeps it float
        if self.settings.granularity != "layer":
            yield stage.name, stage.unit, captured.data()
            return
        for inner, layer in quantized_layers(stage.unit):
            part = _Captured([], [], [])
            for inputs, exact_inputs in zip(captured.inputs, captured.exact_inputs, strict=True):
                run = functools.partial(stage.unit, *load_all(inputs))
                part.inputs.append(self.cache.keep(capture_call(layer, run)[0]))
                run = functools.partial(stage.unit, *load_all(exact_inputs))
                with quantizer_mode(stage.unit, Mode.FLOAT):
                    arguments, target = capture_call(layer, run)
                part.exact_inputs.append(self.cache.keep(arguments))
                part.targets.append(self.cache.keep((target,)))
            yield f"{stage.name}.{inner}", layer, part.data()

    def _finish(self, name: str, module: nn.Module, data: UnitData) -> None:
        """Learn a module, or read it from the journal; the units behind it see it as it is then."""
        seed = self.seed * 100_003 + self.modules_done
        self.modules_done += 1
        if self.journal is not None and self.journal.restore(name, module):
            _log.info("%s was reconstructed before", name)
            self.restored = self.units_done + 1
        else:
            self._learn(name, module, data, self._generator(seed))
        if self.sam.scheme.compat == "published":
            # One of its own: that of the learning has not moved where the unit was read.
            keep_defects(module, self.settings, self._generator(seed))

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.sam.device).manual_seed(seed)

    def _learn(
        self, name: str, module: nn.Module, data: UnitData, generator: torch.Generator
    ) -> None:
        started = time.monotonic()
        losses = reconstruct_unit(
            name,
            module,
            [(layer.weight, layer.weight_quantizer) for _, layer in quantized_layers(module)],
            data,
            self.settings,
            generator,
            functools.partial(self.progress, description=f"reconstructing {name}"),
            # The published implementation knows no way back.
            fall_back=self.sam.scheme.compat == "faithful",
        )
        if losses.fell_back:
            self.worse.append(name)
        seconds = time.monotonic() - started
        self.learning += seconds
        _log.info(
            "reconstructed %s: error %.4g before, %.4g after, %.1f s",
            name,
            losses.before,
            losses.after,
            seconds,
        )
        if self.journal is not None:
            self.journal.record(name, module, losses)

    def warn_of_worse_units(self) -> None:
        """Warn where learning made so many units worse that its settings are to blame."""
        if len(self.worse) > _MANY * self.modules_done:
            _log.warning(
                "learning made %d of %d units worse (%s, ...), which are left rounded to nearest: "
                "more steps (recon.iters) or a lower recon.scale_lr may help",
                len(self.worse),
                self.modules_done,
                self.worse[0],
            )

    def _tell_time_left(self) -> None:
        """By the shares of the plan that were learned here; reading takes no time."""
        if self.plan is None or self.learning == 0:
            return
        before, now = self.plan.share(self.restored), self.plan.share(self.units_done)
        if now > before:
            left = self.learning * (1 - now) / (now - before)
            _log.info("%.0f %% done, about %s left", 100 * now, format_seconds(left))

    def _activations(self) -> contextlib.AbstractContextManager[None]:
        """Activations stay float while a weights-only method (BRECQ) reconstructs."""
        if not self.settings.weights_only:
            return contextlib.nullcontext()
        weights = set(map(id, weight_quantizers(self.sam)))
        return quantizer_mode(self.sam, Mode.FLOAT, lambda q: id(q) not in weights)
