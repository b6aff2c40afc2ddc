"""One error names everything that is not there, and the commands that get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq4sam.downloads import Missing
from ptq4sam.errors import CheckpointError, DataError, DependencyError, MissingError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def told(missing: Missing, otherwise: str = "") -> str:
    with pytest.raises(MissingError) as caught:
        missing.report(otherwise)
    assert "\n" not in str(caught.value)
    # Whoever looks for the error of one kind of file finds this one.
    for kind in (CheckpointError, DataError, DependencyError):
        assert isinstance(caught.value, kind)
    return str(caught.value)


def test_what_is_there_is_no_error(tmp_path: Path) -> None:
    missing = Missing()
    missing.look_for("pictures", tmp_path)
    missing.look_for("annotations", None)
    missing.look_for_packages("detector", ["pytest"], "pip install it")
    assert not missing
    missing.report()


def test_everything_is_named_once_with_one_command() -> None:
    missing = Missing()
    missing.look_for("detector", Path("ckpt/yolox_nano.onnx"))
    missing.look_for("SAM", Path("ckpt/sam_vit_b_01ec64.pth"))
    missing.look_for("annotations", Path("data/coco/annotations/instances_val2017.json"))
    missing.look_for(
        "calibration annotations", Path("data/coco/annotations/instances_train2017.json")
    )
    missing.look_for("again", Path("ckpt/yolox_nano.onnx"))
    assert missing
    message = told(missing, "or do without")
    assert message.startswith("not there: detector ckpt/yolox_nano.onnx (3.7 MB, no checksum, http")
    assert "SAM ckpt/sam_vit_b_01ec64.pth (375 MB, md5 01ec64..., https" in message
    assert "instances_train2017.json (the same download)" in message
    assert message.endswith(
        ": run ptq4sam download yolox-nano-onnx sam-vit-b coco-annotations; or do without"
    )
    assert message.count("yolox_nano.onnx (") == 1
    assert "again" not in message
    assert "name" not in message.partition(": run")[2]


def test_a_file_that_was_looked_for_elsewhere_says_where_the_download_puts_it() -> None:
    missing = Missing()
    missing.look_for("SAM", Path("weights/sam_vit_b_01ec64.pth"))
    assert "sam_vit_b_01ec64.pth; it will be ckpt/sam_vit_b_01ec64.pth)" in told(missing)


def test_what_nobody_publishes() -> None:
    missing = Missing()
    missing.look_for("detector", Path("own.onnx"))
    assert told(missing) == "not there: detector own.onnx: name another"
    missing.look_for("SAM", Path("own.pth"), "leave it away")
    missing.look_for("pictures", Path("data/coco/val2017"))
    assert told(missing) == (
        "not there: detector own.onnx, SAM own.pth (leave it away), "
        "pictures data/coco/val2017 (816 MB): "
        "run ptq4sam download coco-val; name others for the rest"
    )


def test_scenes_are_generated_and_packages_installed() -> None:
    missing = Missing()
    missing.look_for("pictures", Path("data/scenes/images/val"))
    missing.look_for("annotations", Path("data/scenes/annotations/val.json"))
    missing.look_for_packages("detector x", ["pytest", "no_such_package"], "./environment.sh x")
    message = told(missing)
    assert "no_such_package (packages that detector x needs)" in message
    assert "pytest" not in message
    assert message.endswith(": run ptq4sam scenes data/scenes and ./environment.sh x")
