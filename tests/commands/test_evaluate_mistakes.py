"""What `ptq4sam evaluate` refuses, each in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ptq4sam.cli import main
from tests.tiny_runs import REPOSITORY, SCHEMES, Quantized, Tiny, refusal

NANO = REPOSITORY / "ptq4sam" / "assets" / "vit_nano.safetensors"

pytest_plugins = ("tests.tiny_fixtures",)

# Nothing is written beside the repository.
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--images", "broken.json"], "broken.json is a file, not an image folder: give ."),
        (["--prompts", "clicks:2", "--cascade"], "about boxes, but prompts are clicks"),
        (["--prompts", "clicks", "--best-in-multi-mask"], "about boxes, but prompts are clicks"),
        (["--prompts", "broken.txt"], "a list of COCO results, named *.json; known are BOXES.json"),
        (["--annotations", "nowhere.json"], "nowhere.json"),
        (["--annotations", "empty.json"], "no image"),
        (["--annotations", "broken.json"], "broken.json"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--model", "vit_b", "--checkpoint", str(NANO)], "vit_nano"),
        (["--model", "vit_x"], "vit_b, vit_l"),
        (["--prompts", "scene-detektor"], "did you mean scene-detector"),
        (["--prompts", "nowhere.json"], "nowhere.json"),
        (["--prompts", "others.json"], "none of which is among the"),
        (["--prompts", "onnx:nowhere.onnx"], "nowhere.onnx"),
        (["--limit", "0"], "1 or more"),
        (["--max-per-image", "0"], "1 or more"),
        (["--score-threshold", "2"], "0 to 1"),
        (["--seed", "-1"], "seed"),
        (["--device", "cuda:99"], "found cpu"),
        (["--device", "meta"], "found cpu"),
        (["--device", "abacus"], "abacus"),
        (["--work-dir", "broken.json/w"], "broken.json/w"),
        (["--out", "folder"], "folder"),
        (["--show-dir", "broken.json"], "broken.json"),
        (["--scheme", "exp/nowhere.yaml"], "nowhere.yaml"),
        (["--scheme-options", "recon.iters=2"], "--scheme"),
        (["--decoder-only"], "--decoder-only changes a scheme, but none was given"),
        (["--scheme", "SCHEME"], "give calibration pictures"),
        (["--scheme", "SCHEME", "--scheme-options", "calibrat=2"], "calibrate"),
        (["--scheme", "SCHEME", "CALIBRATION", "--calibration-size", "0"], "1 or more"),
        (["--scheme", "SCHEME", "--calibration-annotations", "a.json"], "--calibration-images"),
        (["--scheme", "SCHEME", "--calibration-images", "IMAGES"], "ground-truth"),
        (
            ["--scheme", "SCHEME", "CALIBRATION", "--calibration-annotations", "none.json"],
            "on pictures of which none.json annotates none",
        ),
        (["--float-checkpoint", "broken.json"], "not quantized"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    told: str,
) -> None:
    content = json.loads(tiny.annotations().read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    none = {**json.loads(tiny.annotations("train").read_text()), "annotations": []}
    (tmp_path / "none.json").write_text(json.dumps(none))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.txt").write_text("{")
    (tmp_path / "folder").mkdir()
    other = {"image_id": 77, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0}
    (tmp_path / "others.json").write_text(json.dumps([other]))
    given: list[str] = []
    for word in changed:
        if word == "CALIBRATION":
            given += tiny.calibration()
        else:
            places = {"SCHEME": SCHEMES / "ptq4sam-s44.yaml", "IMAGES": tiny.images("train")}
            given.append(str(places.get(word, word)))
    asked = ["evaluate", *tiny.model(), *tiny.data(), "--work-dir", "w", *given]
    assert told in refusal(capsys, *asked)


def test_bad_combinations_with_a_quantized_file_are_one_line(
    tiny: Tiny, quantized: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", *tiny.data(), "--checkpoint", quantized.path, "--work-dir", "w"]
    assert "quantized already" in refusal(capsys, *asked, *tiny.scheme("ptq4sam-s44"))
    state = load_file(tiny.checkpoint)
    state["image_encoder.pos_embed"] += 1
    save_file(state, tmp_path / "other.safetensors")
    told = refusal(capsys, *asked, "--float-checkpoint", "other.safetensors")
    assert "not made of other.safetensors" in told
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(quantized.path.read_bytes()[:5000])
    assert "cut.safetensors" in refusal(capsys, "audit", cut)
    assert "not a quantized model" in refusal(capsys, "audit", tiny.checkpoint)
    assert "does not exist" in refusal(capsys, "audit", "nowhere.safetensors")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--backend", "openvine"], "backend 'openvine' was asked for: use torch, integer"),
        (["--backend", "onnxruntime", "--precision", "bf16"], "openvino has f32 and bf16"),
    ],
)
def test_a_misspelt_backend_is_told_before_files_are_looked_for(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["evaluate", "--images", "nowhere", "--annotations", "nowhere.json"],
        ["everything", "--images", "nowhere", "--out", "o"],
    ):
        assert told in refusal(capsys, *command, "--checkpoint", "nothing", *given)


def test_a_quantized_file_of_another_model(
    tiny: Tiny, quantized: Quantized, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", "vit_b", "--checkpoint", str(quantized.path)]
    assert main([*command, *map(str, tiny.data())]) == 2
    assert "asked for vit_b, but" in " ".join(capsys.readouterr().err.split())
