"""A quantization that is planned, interrupted, and taken up again from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.errors import DataError
from ptq4sam.runs import auditing
from ptq4sam.sizes import format_bytes, format_seconds, parse_bytes
from tests.tiny_runs import Tiny, run

pytest_plugins = ("tests.tiny_fixtures",)


def quantize(tiny: Tiny, work_dir: Path, *more: object) -> list[object]:
    scheme = tiny.scheme("ptq4sam-l44", "recon.iters=2")
    output = ["--output", work_dir / "model.safetensors", "--work-dir", work_dir]
    return ["quantize", *tiny.model(), *scheme, *output, "--decoder-only", *more]


def test_a_dry_run_plans_and_stops(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*quantize(tiny, tmp_path, "--dry-run", "--memory-budget", "1MiB"))
    told = capsys.readouterr().out
    assert "9 units, 2 pictures, 2 steps a unit" in told
    assert "the memory budget is 1 MiB" in told
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "journal").exists()


def test_an_interrupted_run_goes_on_where_it_was(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(*quantize(tiny, tmp_path / "whole"))
    assert not (tmp_path / "whole" / "journal").exists()

    def fail(*_arguments: object) -> None:
        raise DataError("the audit's picture was lost")

    command = [str(part) for part in quantize(tiny, tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(auditing, "audit_model", fail)
        assert main(command) == 2
    assert len(list((tmp_path / "cut" / "journal").glob("*.safetensors"))) == 1 + 9
    with caplog.at_level("INFO", logger="ptq4sam"):
        run(*command, "--resume")
    told = [record.message for record in caplog.records]
    assert sum(message.endswith("was reconstructed before") for message in told) == 9
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_another_scheme_is_not_resumed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise DataError("the audit's picture was lost")

    monkeypatch.setattr(auditing, "audit_model", fail)
    command = [str(part) for part in quantize(tiny, tmp_path)]
    assert main(command) == 2
    changed = [part.replace("recon.iters=2", "recon.iters=3") for part in command]
    capsys.readouterr()
    assert main([*changed, "--resume"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "scheme differ (scheme there: recon.iters: 2, asked now: recon.iters: 3)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--resume"], "add a scheme"),
        (["--dry-run"], "add a scheme"),
        (["--preset", "quick"], "add --scheme"),
        (["--memory-budget", "much"], "as 8GiB"),
    ],
)
def test_flags_without_sense(
    tiny: Tiny, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", *tiny.model(), *tiny.data(), *arguments]
    assert main(command) == 2
    assert told in capsys.readouterr().err


def test_sizes_and_times_in_words() -> None:
    assert parse_bytes("8GiB") == parse_bytes(" 8 gb ") == 8 * 2**30
    assert parse_bytes("1.5M") == 3 * 2**19
    assert parse_bytes("4096") == 4096
    assert format_bytes(3 * 2**30 + 2**29) == "3.5 GiB"
    assert format_bytes(5 * 2**20) == "5 MiB"
    assert [format_seconds(s) for s in (42, 600, 7200)] == ["42 s", "10 min", "2.0 h"]
