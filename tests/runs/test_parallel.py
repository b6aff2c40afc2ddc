"""Two processes calibrate and evaluate together: the results are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq4sam import parallel
from ptq4sam.data.scenes import write_scenes
from ptq4sam.errors import ConfigError
from tests.tiny_runs import Tiny

pytest_plugins = ("tests.tiny_fixtures",)

ROOT = Path(__file__).resolve().parents[2]


def quantizing(processes: int, model: list[str], data: Path) -> subprocess.Popen[str]:
    """A run of so many processes, started, on the data in a folder; it writes there."""
    work_dir = data / f"{processes}"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "ptq4sam", "quantize"]
    command += [*model, "--scheme", str(ROOT / "exp/ptq4sam-l44.yaml"), "--skip-bad"]
    command += ["--scheme-options", "w_qconfig.observer=MinMaxObserver", "recon.iters=2"]
    command += ["--output", str(work_dir / "model.safetensors"), "--work-dir", str(work_dir)]
    for option, part in (("", "val"), ("calibration-", "train")):
        command += [f"--{option}images", str(data / f"images/{part}")]
        command += [f"--{option}annotations", str(data / f"annotations/{part}.json")]
    command += ["--calibration-size", "3", "--max-per-image", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=data, stdout=pipe, stderr=pipe, text=True)


def quantized(work_dir: Path, said: str) -> tuple[dict[str, object], Path]:
    """Metrics and model file of a run that has ended, by what it said."""
    assert said.count("metrics.json") == 1, "one process tells"
    return json.loads((work_dir / "metrics.json").read_text()), work_dir / "model.safetensors"


def test_two_processes_give_what_one_gives(tiny: Tiny, tmp_path: Path) -> None:
    write_scenes(tmp_path, 3, 0, "train")
    images, _ = write_scenes(tmp_path, 4, 1, "val")
    # The second process finds it, and the first must know.
    damaged = images / "000002.jpg"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    # At the same time: most of it is the start of a Python.
    runs = {count: quantizing(count, tiny.model(), tmp_path) for count in (1, 2)}
    told = {count: started.communicate() for count, started in runs.items()}
    assert [started.returncode for started in runs.values()] == [0, 0], told
    (one, first), (two, second) = (quantized(tmp_path / f"{n}", told[n][0]) for n in runs)
    for metrics in (one, two):
        metrics.pop("phases")
    assert one == two
    assert one["pictures"] == 3
    assert one["skipped"] == {"damaged image": 1}
    states = load_file(first), load_file(second)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_one_process_is_the_whole() -> None:
    assert parallel.count() == 1
    assert parallel.is_first()
    assert parallel.share([1, 2, 3]) == [1, 2, 3]
    assert parallel.gather((1, 2)) == [1, 2]
    assert parallel.from_first(lambda: 5) == 5
    with parallel.joined():
        assert parallel.count() == 1


def test_a_named_gpu_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "count", lambda: 2)
    assert parallel.local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.local_device(torch.device("cuda")) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="2 processes were started for cuda:0"):
        parallel.local_device(torch.device("cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="of 2 GPUs"):
        parallel.local_device(torch.device("cuda"))
