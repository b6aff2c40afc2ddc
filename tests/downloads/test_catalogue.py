"""The catalogue names what the configurations need, and the command shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.downloads import ASSETS, asset_of, find_asset
from ptq4sam.errors import ConfigError
from ptq4sam.solver.config import load_config

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
        assert (asset.unpacked is None) == (asset.makes is None)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean sam-vit-b"):
        find_asset("sam_vit_b")
    with pytest.raises(ConfigError, match="--list"):
        find_asset("?")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("elsewhere/sam_vit_l_0b3195.pth", "sam-vit-l"),
        ("data/coco/val2017", "coco-val"),
        ("data/coco/train2017", "coco-train"),
        ("data/coco/annotations/instances_train2017.json", "coco-annotations"),
        ("data/coco_mini/annotations/instances_val.json", None),
        ("data/coco_mini/images/val2017", None),
        ("own.pth", None),
    ],
)
def test_which_download_a_file_comes_from(path: str, name: str | None) -> None:
    asset = asset_of(Path(path))
    assert (None if asset is None else asset.name) == name


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/sam_vit_b_01ec64.pth").write_bytes(b"x")
    assert main(["download", "--list", "--root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(ASSETS)
    assert re.match(r"sam-vit-b +there +375 MB +Apache-2.0 +ckpt/sam_vit_b", lines[1])
    assert "missing" in lines[2]
    assert main(["download"]) == 2
    assert "--list" in capsys.readouterr().err
