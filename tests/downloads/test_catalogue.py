"""The catalogue names what the configurations need, and the command shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.downloads import ASSETS, asset_at, find_asset, where_from
from ptq4sam.errors import ConfigError
from ptq4sam.runs.configs.literals import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_every_weight_of_the_configurations_is_known() -> None:
    known = {str(asset.path) for asset in ASSETS.values()}
    for path in (ROOT / "projects/configs").glob("*/*.py"):
        if path.parent.name == "_base_":
            continue
        config = load_config(path)
        for part in ("sam", "detector"):
            weights = config.get(part, {}).get("checkpoint")
            if weights and weights.startswith("ckpt/"):
                assert weights in known, f"{path.name}: {weights}"


def test_what_the_catalogue_says_is_possible() -> None:
    for asset in ASSETS.values():
        assert re.match(r"https?://", asset.url)
        assert not asset.path.is_absolute()
        assert asset.digest is None or re.fullmatch(r"[0-9a-f]{6,64}", asset.digest.beginning)
        assert (asset.unpacked is None) == (asset.makes == ())
        assert asset.size is None or asset.about is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sam-vit-b", "375 MB, md5 01ec64..., https://dl.fbaipublicfiles.com/"),
        ("sam-vit-h", "about 2.6 GB, md5 4b8939..., https://"),
        ("yolox-nano-onnx", "3.7 MB, no checksum, https://github.com/Megvii-BaseDetection/"),
        ("hdetr-r50", "no checksum, https://github.com/HDETR/"),
        ("coco-train", "about 19.3 GB"),
    ],
)
def test_facts_are_size_checksum_and_source(name: str, told: str) -> None:
    assert ASSETS[name].facts.startswith(told)


def test_a_whole_checksum_is_not_cut() -> None:
    assert str(ASSETS["coco-val"].digest) == "md5 442b8da7639aecaf257c1dceb8ba8c80"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ckpt/sam_vit_l_0b3195.pth", "sam-vit-l"),
        ("/elsewhere/yolox_l.pth", "yolox-l-megvii"),
        ("data/coco/val2017", "coco-val"),
        ("data/coco/train2017", "coco-train"),
        ("/mnt/coco/annotations/instances_train2017.json", "coco-annotations"),
        ("data/coco_mini/images/val2017", None),
        ("val2017", None),
        ("own.pth", None),
    ],
)
def test_a_missing_file_is_known_by_its_name(path: str, name: str | None) -> None:
    found = asset_at(Path(path))
    assert (None if found is None else found.name) == name


def test_where_a_file_comes_from() -> None:
    here = where_from(Path("ckpt/sam_vit_b_01ec64.pth"))
    assert here.startswith("ptq4sam download sam-vit-b (375 MB, md5 01ec64...")
    assert "which puts it at" not in here
    assert where_from(Path("/w/sam_vit_b_01ec64.pth")) == (
        f"{here}, which puts it at ckpt/sam_vit_b_01ec64.pth"
    )
    assert where_from(Path("data/scenes/images/val")) == "ptq4sam scenes data/scenes generates it"
    assert "ptq4sam download lists" in where_from(Path("own.pth"))


def test_torchvisions_detectors_are_those_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    for name in models.list_models(module=models.detection):
        weights = models.get_model_weights(name).DEFAULT
        (asset,) = [asset for asset in ASSETS.values() if asset.url == weights.url]
        assert asset.name == f"torchvision-{name.replace('_', '-')}"
        assert asset.about == round(weights.meta["_file_size"] * 2**20)
        assert asset.digest is not None
        assert asset.path.stem.endswith(f"-{asset.digest.beginning}")


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean sam-vit-b"):
        find_asset("sam_vit_b")
    with pytest.raises(ConfigError, match="download lists"):
        find_asset("?")


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/sam_vit_b_01ec64.pth").write_bytes(b"x")
    assert main(["download", "--list", "--root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.endswith(":")][1:] == [
        *sorted(ASSETS, key=lambda name: (str(ASSETS[name].path.parent), ASSETS[name].licence))
    ]
    assert "ckpt/, Apache-2.0:" in lines
    assert any(re.match(r"sam-vit-b +there +375 MB$", line) for line in lines)
    assert any(re.match(r"sam-vit-l +missing +about 1.2 GB$", line) for line in lines)
    assert max(map(len, lines)) <= 80
    assert main(["download"]) == 2
    assert "--list" in capsys.readouterr().err
