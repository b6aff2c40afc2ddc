"""Names of prompt sources: taken apart, corrected, and what they need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ptq4sam.commands.flags import SOURCES
from ptq4sam.downloads import ASSETS, Missing
from ptq4sam.errors import ConfigError, MissingError
from ptq4sam.prompts.spec import FORMS, Spec, look_for_prompts, parse_spec

YOLOX = "yolox/yolox_l_8x8_300e_coco.py"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ground-truth", Spec("ground-truth")),
        ("ground-truth:all", Spec("ground-truth", "all")),
        ("scene-detector", Spec("scene-detector")),
        ("b/boxes.json", Spec("boxes", file=Path("b/boxes.json"))),
        ("onnx:a.onnx", Spec("onnx", file=Path("a.onnx"))),
        ("hdetr:h.pth", Spec("hdetr", file=Path("h.pth"))),
        ("torchvision:ssd300_vgg16", Spec("torchvision", "ssd300_vgg16")),
        ("torchvision:ssd300_vgg16:s.pth", Spec("torchvision", "ssd300_vgg16", Path("s.pth"))),
        ("transformers:me/mine", Spec("transformers", "me/mine")),
        ("mmdet:c.py:w.pth", Spec("mmdet", "c.py", Path("w.pth"))),
        ("mmdet:mmdet::d/c.py:w.pth", Spec("mmdet", "mmdet::d/c.py", Path("w.pth"))),
        ("mmdet:c.py:C:/w.pth", Spec("mmdet", "c.py", Path("C:/w.pth"))),
        (r"mmdet:C:\c.py:D:\w.pth", Spec("mmdet", r"C:\c.py", Path(r"D:\w.pth"))),
        ("yolox:~/y.pth", Spec("yolox", file=Path.home() / "y.pth")),
    ],
)
def test_names_are_taken_apart(text: str, expected: Spec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("ground_truth", "ground-truth[:all]"),
        ("ground-truth:every", "ground-truth[:all]"),
        ("groundtruth", "ground-truth[:all]"),
        ("scene_detektor", "scene-detector"),
        ("onxx:/a/long/path/to/yolox_nano.onnx", "onnx:FILE"),
        ("torchvison:ssd300_vgg16", "torchvision:NAME[:FILE]"),
        ("transformer:folder", "transformers:FOLDER"),
        ("mmdetection:a.py:b.pth", "mmdet:CONFIG:FILE"),
        ("focalnet_dino:f.pth", "focalnet-dino:FILE"),
        ("yolo.pth", "yolox:FILE.pth"),
        ("ckpt/yolox_nano.onnx", "onnx:ckpt/yolox_nano.onnx"),
    ],
)
def test_the_nearest_name_is_named(text: str, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(text)
    assert f"did you mean {form}? " in str(caught.value)


@pytest.mark.parametrize("text", ["", "foo:bar", "boxes", "?"])
def test_what_is_like_nothing_lists_what_there_is(text: str) -> None:
    with pytest.raises(ConfigError, match="no prompts are named") as caught:
        parse_spec(text)
    assert all(form in str(caught.value) for form in FORMS.values())


@pytest.mark.parametrize("kind", ["onnx", "yolox", "hdetr", "torchvision", "transformers", "mmdet"])
def test_a_kind_alone_says_how_it_is_written(kind: str) -> None:
    for text in (kind, f"{kind}:"):
        with pytest.raises(ConfigError) as caught:
            parse_spec(text)
        assert f"write {FORMS[kind]}" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (f"mmdetection/configs/{YOLOX}", "yolox-l"),
        ("yolox/yolox_l_8xb8-300e_coco.py", "yolox-l"),
        ("faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py", "faster-rcnn-r50"),
        ("dino/dino_4scale_r50_8x2_12e_coco.py", "dino-r50"),
        ("dino/dino-5scale_swin-l_8xb2-12e_coco.py", "dino-swin-l"),
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", None),
        ("own.py", None),
    ],
)
def test_a_configuration_without_weights_says_which(config: str, name: str | None) -> None:
    for text in (f"mmdet:{config}", f"mmdet:{config}:"):
        with pytest.raises(ConfigError) as caught:
            parse_spec(text)
        told = str(caught.value)
        assert f"write mmdet:{config}:FILE" in told
        if name is None:
            assert "download" not in told
        else:
            assert f"FILE is {ASSETS[name].path} of ptq4sam download {name}" in told


def missing(spec: str) -> str:
    found = Missing()
    look_for_prompts(found, spec)
    with pytest.raises(MissingError) as caught:
        found.report()
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("onnx:ckpt/yolox_nano.onnx", "yolox-nano-onnx"),
        ("yolox:ckpt/yolox_l.pth", "yolox-l-megvii"),
        (f"hdetr:{ASSETS['hdetr-r50'].path}", "hdetr-r50"),
        (f"focalnet-dino:{ASSETS['focalnet-dino-l'].path}", "focalnet-dino-l"),
        (
            "torchvision:ssd300_vgg16:ckpt/ssd300_vgg16_coco-b556d3b4.pth",
            "torchvision-ssd300-vgg16",
        ),
        (f"mmdet:{YOLOX}:{ASSETS['yolox-l'].path}", "yolox-l"),
    ],
)
def test_missing_weights_name_their_download(spec: str, name: str) -> None:
    told = missing(spec)
    assert f"run ptq4sam download {name}" in told
    assert ASSETS[name].url in told


def test_torchvisions_own_weights_are_taken_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    told = missing("torchvision:ssd300_vgg16")
    assert "detector ckpt/ssd300_vgg16_coco-b556d3b4.pth (about 143 MB, sha256 b556d3b4" in told
    assert told.endswith("run ptq4sam download torchvision-ssd300-vgg16")
    for folder in ("hub/checkpoints", "ckpt"):
        file = tmp_path / folder / "ssd300_vgg16_coco-b556d3b4.pth"
        file.parent.mkdir(parents=True)
        file.touch()
        found = Missing()
        look_for_prompts(found, "torchvision:ssd300_vgg16")
        assert not found
        file.unlink()
    with pytest.raises(ConfigError, match="did you mean ssd300_vgg16"):
        missing("torchvision:ssd300_vgg")


def test_a_file_of_boxes_says_what_writes_one() -> None:
    assert "none.json (ptq4sam prompts writes" in missing("none.json")


def test_folders_of_transformers_are_files_and_names_are_not(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert missing(f"transformers:{tmp_path}/none") == (
        f"not there: detector {tmp_path}/none (give a folder that save_pretrained has written)"
    )
    found = Missing()
    look_for_prompts(found, "transformers:owner/model")
    assert not found


@pytest.mark.parametrize(
    ("spec", "install"),
    [
        ("onnx:a", r"pip install 'ptq4sam\[onnx\]'"),
        ("transformers:me/mine", r"pip install 'ptq4sam\[transformers\]'"),
        ("mmdet:a:b", r"\./environment\.sh mmdet"),
    ],
)
def test_packages_that_are_not_installed(
    spec: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq4sam.downloads.missing.find_spec", lambda name: None)
    for file in "ab":
        (tmp_path / file).touch()
    found = Missing()
    look_for_prompts(found, spec)
    with pytest.raises(MissingError, match=f"packages that detector .*: run {install}$"):
        found.report()


def test_the_documentation_has_every_source_and_tests_that_are_there() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "prompts.md").read_text(encoding="utf-8")
    for form in FORMS.values():
        assert f"| `{form}` |" in text
    assert all(form.lower() in SOURCES.lower() for form in FORMS.values())
    named = set(re.findall(r"(?:tests/\w+/)?test_\w+\.py", text))
    assert len(named) > 5
    for name in named:
        places = (root / name, root / "tests" / "prompts" / name)
        assert any(place.is_file() for place in places), name
    for name in re.findall(r"`((?:yolox|hdetr|focalnet|faster|dino|torchvision)-[\w-]+)`", text):
        assert name in ASSETS or name in FORMS, name


def test_every_weight_of_the_catalogue_has_its_address_in_the_readme() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "ckpt" / "README.md").read_text(encoding="utf-8")
    for asset in ASSETS.values():
        if asset.path.parent.name == "ckpt" and not asset.name.startswith("torchvision-"):
            assert asset.url in text
    assert "coco-train" in (root / "data" / "README.md").read_text(encoding="utf-8")
