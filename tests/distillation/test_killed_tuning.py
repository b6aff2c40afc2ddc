"""The reconstruction before a fine-tuning is not done again where a killed run had finished it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4sam.errors import ConfigError, DataError
from ptq4sam.families import VARIANTS
from ptq4sam.model.journal import BEGUN, INDEX, Journal
from ptq4sam.runs import distilling
from ptq4sam.runs.quantizing import JOURNAL
from tests.distillation.conftest import one_thread
from tests.distillation.killed_tuning import reconstructed, tuned, written_inputs
from tests.model.conftest import TINY_VARIANT

ROOT = Path(__file__).resolve().parents[2]
BEFORE = 3
"""Units that the killed run has finished."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path) -> bytes:
    """What a run leaves that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setitem(VARIANTS, "tiny", TINY_VARIANT)
        return tuned(inputs, inputs / "whole", reconstructed())


@pytest.fixture(scope="module")
def left(inputs: Path) -> Path:
    """What a run left that was killed in its reconstruction."""
    arguments = [str(inputs), str(inputs / "cut"), str(BEFORE)]
    command = [sys.executable, "-m", "tests.distillation.killed_tuning", *arguments]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    return inputs / "cut"


@pytest.fixture
def killed(left: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may go on with."""
    return Path(shutil.copytree(left, tmp_path / "cut"))


def restored(caplog: pytest.LogCaptureFixture) -> int:
    told = [record.message for record in caplog.records]
    return sum(message.endswith("was reconstructed before") for message in told)


def test_a_killed_reconstruction_goes_on_to_the_same_bits(
    inputs: Path, whole: bytes, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="ptq4sam"):
        assert tuned(inputs, killed, reconstructed()) == whole
    assert restored(caplog) == BEFORE
    assert not (killed / "work" / JOURNAL).exists()


def test_a_training_that_has_begun_reads_what_it_began_with(
    inputs: Path,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_arguments: object) -> None:
        raise DataError("the audit's picture was lost")

    with monkeypatch.context() as patch:
        patch.setattr(distilling, "audit_model", fail)
        with pytest.raises(DataError, match="was lost"):
            tuned(inputs, tmp_path / "cut", reconstructed())
    journal = tmp_path / "cut" / "work" / JOURNAL
    assert BEGUN in (journal / INDEX).read_text()
    # Without resuming it is refused before anything of it is moved.
    with pytest.raises(ConfigError, match="resume to go on with it"):
        tuned(inputs, tmp_path / "cut", reconstructed(), resume=False)
    assert [path.name for path in journal.parent.glob(f"{JOURNAL}*")] == [JOURNAL]
    with caplog.at_level("INFO", logger="ptq4sam"), monkeypatch.context() as patch:
        # Nothing is learned, or even captured, again.
        patch.setattr(Journal, "record", fail)
        assert tuned(inputs, tmp_path / "cut", reconstructed()) == whole
    assert restored(caplog) == 0


def test_another_scheme_does_not_go_on(inputs: Path, killed: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheme differ .*w_qconfig.bit: 4, .*bit: 6"):
        tuned(inputs, killed, reconstructed().with_overrides("w_qconfig.bit=6"))
    assert len(list((killed / "work" / JOURNAL).glob("*.safetensors"))) == 1 + BEFORE


def test_a_run_that_does_not_resume_moves_the_journal_aside(
    inputs: Path, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="ptq4sam"):
        tuned(inputs, killed, reconstructed(), resume=False)
    assert restored(caplog) == 0
    assert len(list((killed / "work" / f"{JOURNAL}.before1").glob("*.safetensors"))) == 1 + BEFORE
