"""Commands on folders that cannot be written to, on full disks, and beside other runs."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.locks import alone_in
from tests.full_disks import FullDisk, full_disk, mounted
from tests.tiny_runs import SCHEMES, Quantized, Tiny, read_metrics, refusal, run

pytest_plugins = ("tests.tiny_fixtures",)
__all__ = ["full_disk"]


@contextlib.contextmanager
def read_only(kind: str, folder: Path) -> Iterator[None]:
    """A current folder in which no work_dirs/prompts can be made."""
    with contextlib.ExitStack() as stack:
        if kind == "file":
            # In the place of the folder; also root cannot make it then.
            (folder / "work_dirs").touch()
        elif kind == "mode":
            if not hasattr(os, "geteuid") or os.geteuid() == 0:
                pytest.skip("to root every folder is open, and Windows has no such modes")
            folder.chmod(0o555)
            stack.callback(folder.chmod, 0o755)
        else:
            stack.enter_context(mounted(folder, "ro"))
        stack.callback(os.chdir, Path.cwd())
        os.chdir(folder)
        yield


@pytest.mark.parametrize("kind", ["file", "mode", "mount"])
def test_a_read_only_current_folder_takes_no_detections(
    kind: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, work_dir = tmp_path / "here", tmp_path / "w"
    here.mkdir()
    command = ["evaluate", *tiny.model(), *tiny.data(), "--prompts", "scene-detector"]
    with read_only(kind, here):
        run(*command, "--limit", "2", "--work-dir", work_dir)
        notes = [line for line in caplog.messages if line.startswith("detections")]
        assert len(notes) == 1
        assert f"detections are kept in {work_dir / 'prompts'} (" in notes[0]
        assert len(list((work_dir / "prompts").rglob("*.json"))) == 2
        boxes = tmp_path / "out" / "boxes.json"
        run("prompts", "--detector", "scene-detector", *tiny.data(), "--limit", "1", "--out", boxes)
        assert len(list((boxes.parent / "prompts").rglob("*.json"))) == 1
    assert "mean_iou" not in read_metrics(work_dir)


def test_detections_that_cannot_be_kept_cost_only_time(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("work_dirs", "w/prompts"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    command = ["quantize", *tiny.model(), *tiny.data(), *tiny.scheme("minmax44"), "--decoder-only"]
    run(*command, "--prompts", "scene-detector", "--output", "m.safetensors", "--work-dir", "w")
    notes = [line for line in caplog.messages if line.startswith("detections")]
    # One, though boxes of five pictures in two data sets were to be kept.
    assert len(notes) == 1
    assert notes[0].startswith("detections are not kept (")


def test_a_read_only_folder_gives_what_was_kept_in_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", *tiny.model(), *tiny.data(), "--prompts", "scene-detector"]
    run(*command, "--work-dir", "first")
    kept = {path: path.stat().st_mtime_ns for path in Path("work_dirs/prompts").rglob("*.json")}
    assert len(kept) == 3
    monkeypatch.setattr(
        "ptq4sam.prompts.scene_detector.SceneDetector.prompts",
        lambda *_: pytest.fail("boxes are there already"),
    )
    run(*command, "--work-dir", "second")
    assert not Path("second/prompts").exists()


@pytest.mark.parametrize(
    "command",
    ["evaluate", "quantize", "sensitivity", "mixed", "sweep", "demo", "scenes", "everything"],
)
def test_a_full_disk_is_one_line_with_the_file(
    command: str,
    tiny: Tiny,
    tmp_path: Path,
    full_disk: FullDisk,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: {{scheme: {SCHEMES / 'minmax44.yaml'}}}\ngrid: {{bits: [4]}}\n")
    common = [*tiny.model(), *tiny.data(), "--decoder-only", "--work-dir", "d/w"]
    scheme = tiny.scheme("minmax44")
    arguments = {
        "evaluate": common[:-3] + common[-2:],
        "quantize": [*common, *scheme, "--output", "d/m.safetensors"],
        "sensitivity": [*common, *scheme],
        "mixed": [*common, *scheme, "--bits", 4, 8, "--budget", "w8a8", "--output", "d/m.yaml"],
        "sweep": [sweep, "--work-dir", "d/w"],
        "demo": ["--work-dir", "d/w"],
        "scenes": ["d/w"],
        "everything": [
            *("--images", tiny.images(), "--limit", "1", "--out", "d/w"),
            *("--set", "points_per_side=4"),
        ],
    }[command]
    with full_disk() as reason:
        told = refusal(capsys, command, *arguments)
    assert told.startswith("error: d/")
    # SQLite has its own word for a limit, but not for a full disk.
    reasons = {reason, "disk I/O error"} if reason == os.strerror(errno.EFBIG) else {reason}
    assert any(f": {one}" in told for one in reasons)


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ptq4sam", "cost"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize("command", ["evaluate", "resume", "sensitivity", "mixed", "sweep", "demo"])
def test_a_second_run_in_a_work_directory_is_told(
    command: str,
    quantized: Quantized,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w").mkdir()
    before = Path("w/run.log")
    before.write_text("of the first run\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: {{scheme: {SCHEMES / 'minmax44.yaml'}}}\ngrid: {{bits: [4]}}\n")
    common = [*tiny.model(), *tiny.data(), "--work-dir", "w"]
    scheme = tiny.scheme("minmax44")
    arguments = {
        "evaluate": ["evaluate", *common],
        "resume": ["quantize", *common, *scheme, "--output", "m.safetensors", "--resume"],
        "sensitivity": ["sensitivity", *common, *scheme],
        "mixed": ["mixed", *common, *scheme, "--budget", "w8a8", "--output", "m.yaml"],
        "sweep": ["sweep", sweep, "--work-dir", "w"],
        "demo": ["demo", "--work-dir", "w"],
    }[command]
    with alone_in(Path("w")):
        told = refusal(capsys, *arguments)
        assert "w is in use by another run" in told
        assert "name another folder" in told
        # Who only reads is let in, and so is a plan.
        plan = ["quantize", *common, *scheme, "--output", "m.safetensors", "--dry-run"]
        assert main([str(argument) for argument in plan]) == 0
    assert before.read_text() == "of the first run\n"


@pytest.mark.parametrize("command", ["onnx", "openvino", "nncf", "everything", "scenes"])
def test_a_second_writer_of_a_folder_is_told(
    command: str,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two exports would leave a description of one and graphs of the other."""
    monkeypatch.chdir(tmp_path)
    arguments: list[object]
    if command == "nncf":
        pytest.importorskip("nncf")
        pictures = ["--calibration-images", tiny.images(), *tiny.model()]
        arguments = ["quantize", "--method", "nncf", *pictures, "--output", "d"]
    elif command == "everything":
        arguments = ["everything", "--images", tiny.images(), "--out", "d"]
    elif command == "scenes":
        arguments = ["scenes", "d", "--train", 1, "--val", 1]
    else:
        if command == "openvino":
            pytest.importorskip("openvino")
        arguments = ["export", "vit_nano", "--format", command, "--output", "d"]
    with alone_in(Path("d")):
        held = sorted(Path("d").iterdir())
        assert "d is in use by another run" in refusal(capsys, *arguments)
        assert sorted(Path("d").iterdir()) == held


def test_a_report_is_written_beside_a_run(quantized: Quantized, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with alone_in(quantized.work_dir):
        run("report", quantized.work_dir, "--output", tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size > 1000


@pytest.mark.parametrize(
    "given",
    [
        ["evaluate", "--images", "val", "--annotations", "a.json", "--output", "a.json"],
        ["evaluate", "--images", "val", "--prompts", "a.json", "--output", "./a.json"],
        ["evaluate", "--images", "val", "--annotations", "a.json", "--show-dir", "val"],
        ["quantize", "--checkpoint", "f.pth", "--scheme", "w8a8", "--output", "f.pth"],
        [
            "mixed",
            "--images",
            "val",
            "--scheme",
            "s.yaml",
            "--budget",
            "w4a4",
            "--output",
            "s.yaml",
        ],
        ["distil", "--student", "vit_nano", "--init", "f.pth", "--output", "f.pth"],
        ["prompts", "--detector", "a.json", "--images", "val", "--output", "a.json"],
        ["export", "f.pth", "--format", "onnx", "--output", "f.pth"],
    ],
)
def test_what_is_read_is_not_written_over(
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val").mkdir()
    for name in ("a.json", "f.pth", "s.yaml"):
        (tmp_path / name).write_text(name)
    assert "would be written over what is read as" in refusal(capsys, *given)
    assert all((tmp_path / name).read_text() == name for name in ("a.json", "f.pth", "s.yaml"))
