"""How idle threads wait is said before torch is loaded, unless the user has said it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptq4sam import threads

_ROOT = Path(__file__).resolve().parents[1]
_TELL = (
    "import os, sys; from ptq4sam.threads import SETTINGS; "
    "print({name: os.environ[name] for name in sorted(SETTINGS) if name in os.environ})"
)
_ASLEEP = {"GOMP_SPINCOUNT": "300", "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**base, "PYTHONPATH": str(_ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_importing_ours_sets_it_and_does_not_load_torch() -> None:
    done = run(_TELL + "; assert 'torch' not in sys.modules")
    assert done.stdout.strip() == str(_ASLEEP)


@pytest.mark.parametrize("name", sorted(threads.SETTINGS))
def test_settings_of_the_user_stay(name: str) -> None:
    own = {name: "ACTIVE" if name == "OMP_WAIT_POLICY" else "7"}
    assert run(_TELL, **own).stdout.strip() == str(own)


def test_torch_reads_it() -> None:
    program = "import ptq4sam, torch; assert torch.get_num_threads() > 0"
    told = run(program, OMP_DISPLAY_ENV="true").stderr
    if "OMP_WAIT_POLICY" not in told:
        pytest.skip("this torch's OpenMP does not tell its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in told


def test_where_torch_was_first_the_processes_that_are_started_have_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    with caplog.at_level(logging.DEBUG, logger="ptq4sam"):
        assert threads.wait_asleep()
    assert "torch was imported before" in caplog.text
    assert {name: os.environ[name] for name in _ASLEEP} == _ASLEEP
    assert not threads.wait_asleep()


@pytest.mark.parametrize(
    "script",
    [
        "ptq4sam/__main__.py",
        "ptq4sam/solver/test_quant.py",
        "tools/train_scene_detector.py",
        "tools/train_vit_nano.py",
        "tools/write_agreement.py",
        "tools/write_nncf.py",
        "benchmarks/observers.py",
        "benchmarks/quantized_forward.py",
        "benchmarks/random_sam.py",
    ],
)
def test_programs_import_ours_before_torch(script: str) -> None:
    imported = [
        line.split()[1].split(".")[0]
        for line in (_ROOT / script).read_text(encoding="utf-8").splitlines()
        if line.startswith(("import ", "from "))
    ]
    heavy = {"torch", "data_sets", "nano_data", "nano_model"}
    assert "ptq4sam" in imported
    assert not heavy.intersection(imported[: imported.index("ptq4sam")])


class _Weights(torch.nn.Module):
    """Only what the number of threads follows from."""

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(weights, device="meta"))


@pytest.mark.parametrize(
    ("weights", "side", "expected"),
    [(3_000_000, 256, 1), (10_000_000, 512, 5), (90_000_000, 1024, 16)],
)
def test_threads_follow_the_work_of_a_picture(
    weights: int, side: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(16)
        with threads.suited_threads(_Weights(weights), side):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 16
        monkeypatch.setenv("OMP_NUM_THREADS", "16")
        with threads.suited_threads(_Weights(weights), side):
            assert torch.get_num_threads() == 16
    finally:
        torch.set_num_threads(before)
