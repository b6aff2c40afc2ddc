"""Workers without models, whose tasks say in their labels what happens to them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sweep.settings import TrialSettings
from ptq4sam.sweep.tasks import Kind, Outcome, Task

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = TrialSettings(Scheme.from_yaml(ROOT / "exp" / "minmax44.yaml"))


def task(key: str, label: str = "", needs: tuple[str, ...] = (), kind: Kind = "trial") -> Task:
    return Task(kind, key, replace(SETTINGS, seed=len(key)), needs, label or key)


@dataclass
class FakeWorker:
    number: int
    neighbours: int

    def do(self, task: Task) -> Outcome:
        name = f"worker {self.number} of {self.neighbours}"
        if task.label == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.label == "exits":
            os._exit(7)
        if task.label == "raises":
            raise RuntimeError("not an outcome")
        if task.label == "slow":
            time.sleep(0.3)
        if task.label == "long":
            time.sleep(60)
        error = "out of memory" if task.label == "fails" else None
        environment = os.environ.get("FAKE_WORKER", "")
        metrics = {"AP": 10.0, "process": os.getpid(), "environment": environment}
        return Outcome(error, metrics, {}, {"ptq4sam": "0"}, name, f"log of {task.key}")


class InlinePool:
    """One worker, in this process; remembers what it was given."""

    def __init__(self, worker: object) -> None:
        self.worker = worker
        self.given: list[Task] = []
        self._ended: list[tuple[Task, Outcome]] = []

    @property
    def free(self) -> int:
        return 1 - len(self._ended)

    def give(self, task: Task) -> None:
        self.given.append(task)
        self._ended.append((task, self.worker.do(task)))  # type: ignore[attr-defined]

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        ended, self._ended = self._ended, []
        return ended
