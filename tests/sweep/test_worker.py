from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4sam.extensions import EXTENSIONS
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.prompts.scene_detector import SceneDetector
from ptq4sam.quantization.registry import METHODS
from ptq4sam.runs import models, quantizing
from ptq4sam.runs.run import Run
from ptq4sam.runs.settings import RunSettings
from ptq4sam.sam.predictor import Predictor
from ptq4sam.sweep import worker as workers
from ptq4sam.sweep.grid import Sweep, read_sweep
from ptq4sam.sweep.scheduler import State, schedule
from ptq4sam.sweep.store import Store
from ptq4sam.sweep.tasks import Folder, plan
from ptq4sam.sweep.worker import Worker
from tests.sweep.fake_workers import InlinePool
from tests.tiny_runs import SCHEMES, Tiny

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = pytest.mark.usefixtures("small_nano")


def sweep_of(tiny: Tiny, folder: Path, grid: str, *base: str) -> Sweep:
    def pictures(split: str) -> str:
        return f"{{images: {tiny.images(split)}, annotations: {tiny.annotations(split)}}}"

    path = folder / "sweep.yaml"
    lines = [
        f"scheme: {SCHEMES / 'ptq4sam-l44.yaml'}",
        "scheme.w_qconfig.observer: MinMaxObserver",
        "scheme.calibrate: 2",
        "quantize_encoder: false",
        "steps: 2",
        "device: cpu",
        "prompts: scene-detector",
        "prompting.max_per_image: 4",
        f"checkpoint: {tiny.checkpoint}",
        f"data: {pictures('val')}",
        f"calibration: {pictures('train')}",
        *base,
    ]
    path.write_text(f"base: {{{', '.join(lines)}}}\ngrid: {grid}")
    return read_sweep(path)


def do(sweep: Sweep, folder: Path) -> State:
    where = Folder(folder)
    with Store(where.store) as store:
        return schedule(plan(sweep.trials, where), InlinePool(Worker(where)), store, {})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the expensive things happen."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, what: Any) -> None:
        inner = getattr(owner, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counts[what if isinstance(what, str) else what(*arguments)] += 1
            return inner(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    def model(predictor: Predictor, *_: object) -> str:
        return "quantized" if isinstance(predictor.sam, QuantizedSam) else "float"

    count(SceneDetector, "prompts", "detections")
    count(Predictor, "embed", model)
    count(workers, "calibrate", "calibrations")
    count(models, "load_sam", "models")
    return counts


def test_what_trials_share_is_computed_once(
    tiny: Tiny, tmp_path: Path, counted: Counter[str]
) -> None:
    grid = "{scheme.ptq4sam.BIG: [false, true], seed: [0, 1]}"
    state = do(sweep_of(tiny, tmp_path, grid), tmp_path / "w")
    assert [record.error for record in state.records.values()] == [""] * 4
    assert counted == {
        "models": 1,
        "detections": 3 + 2,  # of three pictures to evaluate and two to calibrate on
        "float": 3,
        "calibrations": 2,  # the seed has no part in them
        "quantized": 4 * (3 + 2),  # and two passes of each audit
    }
    assert state.shared == {"boxes": 1, "float": 1, "calibration boxes": 1, "calibration": 2}
    # What is there already is not planned again.
    more = sweep_of(tiny, tmp_path, "{scheme.ptq4sam.BIG: [false, true], seed: [0, 1, 2]}")
    tasks = plan(
        [trial for trial in more.trials if trial.key not in state.records], Folder(tmp_path / "w")
    )
    assert [task.kind for task in tasks] == ["trial", "trial"]


def test_a_trial_finds_what_a_run_of_its_own_finds(tiny: Tiny, tmp_path: Path) -> None:
    sweep = sweep_of(tiny, tmp_path, "{seed: [5]}")
    (trial,) = sweep.trials
    record = do(sweep, tmp_path / "w").records[trial.key]
    assert trial.settings.data is not None
    assert trial.settings.calibration is not None
    alone = Run(
        RunSettings(
            model="vit_nano",
            data=trial.settings.data.data(),
            calibration=trial.settings.calibration.data(),
            prompts="scene-detector",
            checkpoint=tiny.checkpoint,
            scheme=trial.settings.scheme,
            quantize_encoder=False,
            prompting=trial.settings.prompting,
            work_dir=tmp_path / "run",
            cache_dir=tmp_path / "boxes",
            device="cpu",
            seed=5,
        )
    ).execute()
    expected = {key: alone[key] for key in ("AP", "AP50", "AR", "agreement", "masks")}
    assert {key: record.metrics[key] for key in expected} == expected
    assert record.metrics["float"]["AP"] == alone["float"]["AP"]
    assert record.metrics["audit"] is True
    pairs = list(record.metrics["by_picture"].values())
    masks = sum(count for _, count in pairs)
    assert masks == record.metrics["masks"]
    mean = sum(mean * count for mean, count in pairs) / masks
    assert mean == pytest.approx(record.metrics["agreement"])
    own = {"quantize", "audit", "evaluate"}
    assert {*own, "data", "load", "shared results"} <= set(record.phases)
    assert "reconstructed mask_decoder.transformer.layers.0.self_attn" in record.log


FAILURES = {
    1: (MemoryError(), "out of memory (in Python): calibrate on fewer pictures"),
    2: (RuntimeError("CPUAllocator: not enough memory: you tried 9 GB"), "out of memory (CPUA"),
    3: (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory)"),
    4: (ValueError("a mistake\nof ours"), "ValueError: a mistake of ours"),
}


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = quantizing.quantize_sam

    def quantize(*arguments: Any, seed: int = 0, **named: Any) -> Any:
        if seed in FAILURES:
            raise FAILURES[seed][0]
        return inner(*arguments, seed=seed, **named)

    monkeypatch.setattr(quantizing, "quantize_sam", quantize)
    sweep = sweep_of(tiny, tmp_path, "{seed: [0, 1, 2, 3, 4, 5]}", "limit: 1")
    state = do(sweep, tmp_path / "w")
    for trial in sweep.trials:
        record = state.records[trial.key]
        if record.seed not in FAILURES:
            assert (record.status, record.error) == ("done", "")
            continue
        error, told = FAILURES[record.seed]
        assert record.status == "failed"
        assert told in record.error
        assert type(error).__name__ in record.log


FAILING = """
from ptq4sam.methods.method import METHODS, Method

@METHODS.register("failing")
class Failing(Method):
    def after_ranges(self, calibration):
        return changd
"""


def test_a_fault_of_an_extension_is_told_with_its_line_and_traceback(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "failing.py"
    mine.write_text(FAILING)
    monkeypatch.setenv(EXTENSIONS, str(mine))
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    sweep = sweep_of(tiny, tmp_path, "{seed: [0, 1]}", "scheme.methods: [failing]", "limit: 1")
    state = do(sweep, tmp_path / "w")
    sys.modules.pop("ptq4sam_extension_failing")
    for record in state.records.values():
        # The shared calibration failed, whose log says where.
        told = f"method failing ({mine}:7): NameError: name 'changd' is not defined"
        assert record.error == f"calibration of vit_nano: {told}"
        assert "Traceback" in record.log
        assert f'File "{mine}", line 7, in after_ranges' in record.log
        assert record.versions


def test_float_model_that_cannot_be_loaded_fails_its_trials(tiny: Tiny, tmp_path: Path) -> None:
    sweep = sweep_of(tiny, tmp_path, "{checkpoint: [no.pth], seed: [0, 1]}")
    state = do(sweep, tmp_path / "w")
    assert {record.status for record in state.records.values()} == {"failed"}
    assert all("no.pth: no such file" in record.error for record in state.records.values())


def test_a_worker_has_loaded_extensions_before_its_first_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A task's settings may be of a class of theirs, which cannot be unpickled otherwise.
    (tmp_path / "of_a_user.py").write_text("WORD = 1")
    monkeypatch.setenv(EXTENSIONS, str(tmp_path / "of_a_user.py"))
    Worker(Folder(tmp_path))
    assert sys.modules.pop("ptq4sam_extension_of_a_user").WORD == 1
