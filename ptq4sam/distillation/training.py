"""A distillation from its first step to its last: pictures in order, states on disk, curves."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam import parallel
from ptq4sam.distillation.settings import DistillationSettings
from ptq4sam.distillation.trainer import Trainer
from ptq4sam.distillation.views import Batch, Key, Views
from ptq4sam.errors import ConfigError, ResourceError, in_one_line
from ptq4sam.files import replacing, write_json
from ptq4sam.model.journal import require_same
from ptq4sam.progress import Progress, silent
from ptq4sam.sam.model import Sam
from ptq4sam.threads import computing_with

_log = logging.getLogger(__name__)

STATE = "state.safetensors"
"""The file of a training that goes on with it, in its folder."""
CURVES = "distillation.json"
"""The file of its curves, which a report draws."""
CURVE_POINTS = 200
"""Most values of a curve."""
_SAVE_EVERY = 120.0
"""Seconds between two states."""
_AHEAD = 8
"""Batches that a thread makes ahead of the step that takes them."""
_OPTIMIZER, _MODEL, _AVERAGE = "optimizer.", "model.", "average."


class Training:
    """All phases of a distillation.

    Several processes (see `parallel`) share each batch, and the first one writes.

    Args:
        student: learns in place.
        teacher: None to learn from the truth alone.
        views: that are shown.
        settings: of the distillation.
        folder: of state and curves.
        fingerprint: what the numbers depend on, by name.
        frozen: names of the student's parameters that stay as they are.
        save_every: seconds between two states.
    """

    def __init__(
        self,
        student: Sam,
        teacher: Sam | None,
        views: Views,
        settings: DistillationSettings,
        folder: Path,
        fingerprint: Mapping[str, str],
        *,
        frozen: Sequence[str] = (),
        save_every: float = _SAVE_EVERY,
    ) -> None:
        settings.require_something_to_learn(teacher is not None)
        for number, phase in enumerate(settings.phases):
            if phase.batch % parallel.count():
                raise ConfigError(
                    f"phases.{number}.batch: {phase.batch} pictures cannot be shared by "
                    f"{parallel.count()} processes: choose a multiple"
                )
        self._student, self._teacher, self._views = student, teacher, views
        self._settings, self._folder = settings, folder
        self._fingerprint = dict(fingerprint)
        self._frozen, self._save_every = frozen, save_every
        self._trainer = self._begin(0)
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._recent: list[dict[str, float]] = []
        # Another number of threads adds in another order.
        self._threads = torch.get_num_threads()

    @property
    def done(self) -> int:
        """Steps that were made, of all phases."""
        before = self._settings.phases[: self._trainer.number]
        return sum(phase.steps for phase in before) + self._trainer.step

    def resume(self) -> bool:
        """Go on with the folder's state; False where there is none.

        Raises:
            ConfigError: it is another training's, or damaged.
        """
        path = self._folder / STATE
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads(file.metadata()["distillation"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read ({' '.join(str(error).split())[:200]}): start again "
                "without resuming"
            ) from error
        require_same(path, said["fingerprint"], self._fingerprint)
        self._trainer = self._begin(said["phase"])
        self._restore(tensors, said["step"])
        self._curves = {k: [(s, v) for s, v in points] for k, points in said["curves"].items()}
        self._recent = said["recent"]
        self._threads = said.get("threads", self._threads)
        _log.info("going on after step %d of %d", self.done, self._settings.steps)
        return True

    def run(self, workers: int = 1, progress: Progress = silent) -> dict[str, Tensor]:
        """Train to the end, from wherever it is.

        Args:
            workers: threads that make batches beside this one; 0 for none. They change nothing.
            progress: shows how far it is.

        Returns:
            The averaged weights.

        Raises:
            ConfigError: it diverged.
            DataError: a picture is damaged.
            ResourceError: a state cannot be written; the last complete one stays.
        """
        with computing_with(self._threads):
            return self._run(workers, progress)

    def _run(self, workers: int, progress: Progress) -> dict[str, Tensor]:
        plan = [(n, s) for n, p in enumerate(self._settings.phases) for s in range(p.steps)]
        plan = plan[self.done :]
        saved = time.monotonic()
        batches = self._batches(plan, workers)
        for number, step in progress(plan, "distilling"):
            if number != self._trainer.number:
                self._student.load_state_dict(self._trainer.average)
                self._trainer = self._begin(number)
            noted = self._trainer.train_step(next(batches))
            if not math.isfinite(noted["loss"]):
                raise ConfigError(
                    f"the training diverged at step {step} of phase {number} (loss "
                    f"{noted['loss']}): lower phases.{number}.rate, and start again"
                )
            self._note(noted)
            if time.monotonic() - saved >= self._save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        return self._trainer.average

    def save(self) -> None:
        """Write state and curves, at once or not at all; the first process's only.

        Raises:
            ResourceError: the system refuses it.
        """
        if not parallel.is_first():
            return
        trainer = self._trainer
        said = {
            "fingerprint": self._fingerprint,
            "phase": trainer.number,
            "step": trainer.step,
            "curves": self._curves,
            "recent": self._recent,
            "threads": self._threads,
        }
        curves = {
            "student": self._student.name,
            "teacher": None if self._teacher is None else self._teacher.name,
            "settings": self._settings.to_dict(),
            "steps": self._settings.steps,
            "done": self.done,
            "curves": self._curves,
        }
        try:
            with replacing(self._folder / STATE) as temporary:
                save_file(self._tensors(), temporary, {"distillation": json.dumps(said)})
            write_json(curves, self._folder / CURVES)
        except OSError as error:
            raise ResourceError(
                f"{in_one_line(error)}: the state of the training cannot be written: make room, "
                "then resume; the last complete state is kept"
            ) from error

    def _begin(self, number: int) -> Trainer:
        return Trainer(
            self._student,
            self._teacher,
            self._settings.phases[number],
            self._settings,
            number,
            self._frozen,
        )

    def _batches(self, plan: Sequence[tuple[int, int]], workers: int) -> Iterator[Batch]:
        """This process's part of the batches of all steps that are left.

        Threads make them: processes would be forked from one that has loaded runtimes, whose next
        child then ended it by a segmentation fault.
        """
        order = _Order(plan, [phase.batch for phase in self._settings.phases])
        if not workers:
            yield from map(self._batch, order)
            return
        pool, waiting = ThreadPoolExecutor(workers, "views"), deque[Future[Batch]]()
        try:
            for keys in order:
                waiting.append(pool.submit(self._batch, keys))
                if len(waiting) > workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(self, keys: list[Key]) -> Batch:
        return Batch.of([self._views[key] for key in keys])

    def _note(self, noted: dict[str, float]) -> None:
        """Keep the terms of a step; as many steps as make a point of a curve become one."""
        self._recent.append(noted)
        together = max(1, math.ceil(self._settings.steps / CURVE_POINTS))
        if len(self._recent) < together:
            return
        for name in dict.fromkeys(name for one in self._recent for name in one):
            values = [one[name] for one in self._recent if name in one]
            self._curves.setdefault(name, []).append((self.done, math.fsum(values) / len(values)))
        self._recent = []
        told = ", ".join(f"{k} {points[-1][1]:.4g}" for k, points in self._curves.items())
        _log.info("step %d of %d: %s", self.done, self._settings.steps, told)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs, by name."""
        trainer = self._trainer
        found: dict[str, Tensor] = {}
        for name, value in self._student.state_dict().items():
            found[_MODEL + name] = value
        for name, value in trainer.average.items():
            found[_AVERAGE + name] = value
        for index, slots in trainer.optimizer.state_dict()["state"].items():
            for name, value in slots.items():
                found[f"{_OPTIMIZER}{index}.{name}"] = value
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def _restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        trainer = self._trainer
        self._student.load_state_dict(_part(tensors, _MODEL))
        trainer.average = {k: v.to(trainer.device) for k, v in _part(tensors, _AVERAGE).items()}
        slots: dict[int, dict[str, Any]] = {}
        for name, value in _part(tensors, _OPTIMIZER).items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        groups = trainer.optimizer.state_dict()["param_groups"]
        trainer.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        trainer.step = step


class _Order(Sequence[list[Key]]):
    """Keys of this process's views of each step.

    Args:
        plan: phase and step of each.
        batches: views of a step of each phase, of all processes together.
    """

    def __init__(self, plan: Sequence[tuple[int, int]], batches: Sequence[int]) -> None:
        self._plan, self._batches = plan, batches

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: Any) -> Any:
        number, step = self._plan[place]
        batch = self._batches[number]
        mine = parallel.share(range(step * batch, (step + 1) * batch))
        return [(number, index) for index in mine]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
