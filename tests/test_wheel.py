"""The wheel alone, unpacked, in an empty folder: what needs no checkout works there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_runs import REPOSITORY

CONTENT = ("ptq4sam", "exp", "projects", "mmdetection")
BESIDE = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

ERRANDS = """
import sys
from pathlib import Path

import ptq4sam
from ptq4sam.cli import main
from ptq4sam.solver import test_quant

assert Path(ptq4sam.__file__).is_relative_to(sys.argv[1]), ptq4sam.__file__
data = ["--calibration-images", "scenes/images/train"]
data += ["--calibration-annotations", "scenes/annotations/train.json", "--calibration-size", "1"]
boxes = ["--detector", "scene-detector"]
published = ["--config", "yolo_l-sam-vit-b", "--q_config", "exp/config66.yaml"]
errands = {
    "scenes": ["scenes", "scenes", "--train", "1", "--val", "1"],
    "quantize": ["quantize", "--scheme", "minmax44", *data, "--decoder-only", "--output"],
    "table": ["table", "coco", "--dry-run"],
    "prompts": ["prompts", *boxes, "--dataset", "scenes/images/val", "--out", "boxes.json"],
    "sweep": ["sweep", "bimodal", "--dry-run"],
}
errands["quantize"].append("q.safetensors")
for name, arguments in errands.items():
    sys.stdout.write(f"=== {name}: {main(arguments)}\\n")
sys.stdout.write(f"=== published: {test_quant.main(published)}\\n")
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in CONTENT:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in BESIDE:
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(made)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = made.glob("ptq4sam-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made / "unpacked")
    return made / "unpacked"


def test_files_of_a_checkout_are_in_the_wheel(unpacked: Path) -> None:
    assets = unpacked / "ptq4sam" / "assets"
    for folder in CONTENT[1:]:
        here = {path.relative_to(REPOSITORY) for path in (REPOSITORY / folder).rglob("*.[py]*")}
        assert len(here) > 10
        assert here == {path.relative_to(assets) for path in (assets / folder).rglob("*.[py]*")}
    assert not (unpacked / "tests").exists()


def test_errands_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ERRANDS, str(unpacked)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )
    ends = [line for line in done.stdout.splitlines() if line.startswith("===")]
    # The published command needs SAM-B and COCO: it says what it lacks.
    expected = [("scenes", 0), ("quantize", 0), ("table", 0), ("prompts", 0), ("sweep", 0)]
    assert ends == [f"=== {name}: {status}" for name, status in [*expected, ("published", 2)]], (
        done.stdout + done.stderr
    )
    assert "300 cells" in done.stdout
    assert "ptq4sam download yolox-l sam-vit-b" in done.stderr
    assert (tmp_path / "q.safetensors").exists()
