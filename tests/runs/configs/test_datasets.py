"""What `--images` may be without annotations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ptq4sam.data import CocoDataset
from ptq4sam.data.scenes import write_scenes
from ptq4sam.errors import ConfigError, DataError
from ptq4sam.runs.configs.datasets import NAMED, find_dataset, images_beside
from ptq4sam.runs.configs.experiment import DataConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of two pictures, and their annotations."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), 2, seed=0, split="val")


@pytest.mark.parametrize("name", ["coco", "coco_mini", "scenes"])
def test_the_names_of_the_repository(name: str) -> None:
    found = find_dataset(name, named=ROOT / NAMED)
    assert found.images.parts[:2] == ("data", name)
    assert found.annotations is not None
    assert found.annotations.suffix == ".json"


def test_a_configuration() -> None:
    path = ROOT / "projects/configs/yolox/yolox_nano-sam-vit-nano.py"
    assert find_dataset(str(path)) == find_dataset("coco_mini", named=ROOT / NAMED)


def test_annotations_with_their_pictures_beside_them(scenes: tuple[Path, Path]) -> None:
    images, annotations = scenes
    found = find_dataset(str(annotations))
    assert (found.images, found.annotations) == (images.resolve(), annotations)
    assert len(CocoDataset(found.images, found.annotations).images) == 2


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("a.json", "."),
        ("a.json", "val2017"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val.json", "images/val2017"),
        ("annotations/a.json", "images"),
    ],
)
def test_usual_layouts(
    file: str,
    folder: str,
    scenes: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "images" / "train2017").mkdir(parents=True)
    shutil.copytree(scenes[0], tmp_path / folder, dirs_exist_ok=True)
    target = tmp_path / file
    target.parent.mkdir(exist_ok=True)
    shutil.copy(scenes[1], target)
    assert images_beside(target) == (tmp_path / folder).resolve()
    # As a user in that folder names it.
    monkeypatch.chdir(target.parent)
    assert find_dataset(target.name).images == (tmp_path / folder).resolve()


def test_a_folder_has_no_annotations(scenes: tuple[Path, Path]) -> None:
    assert find_dataset(str(scenes[0])) == DataConfig(scenes[0])


def test_what_is_no_data_set(tmp_path: Path, scenes: tuple[Path, Path]) -> None:
    named = ROOT / NAMED
    with pytest.raises(ConfigError, match=r"'coco_mimi': did you mean coco_mini\? there are coco,"):
        find_dataset("coco_mimi", named=named)
    with pytest.raises(ConfigError, match="there are none in"):
        find_dataset("coco", named=tmp_path)
    with pytest.raises(ConfigError, match="no data set is named 'sam_vit_b'"):
        find_dataset("sam_vit_b", named=named)
    with pytest.raises(ConfigError, match=r"sam_vit_b\.py: data: missing"):
        find_dataset(str(named / "sam_vit_b.py"))
    with pytest.raises(DataError, match=r"there is no annotations file .*none\.json"):
        find_dataset(str(tmp_path / "none.json"))
    alone = tmp_path / "alone" / "annotations" / "a.json"
    alone.parent.mkdir(parents=True)
    shutil.copy(scenes[1], alone)
    with pytest.raises(DataError, match=r"a\.json were looked for beside it.*give their folder"):
        find_dataset(str(alone))
    for content in ([], {}, {"images": []}, {"images": [3]}, {"images": [{"file_name": ""}]}):
        alone.write_text(json.dumps(content))
        with pytest.raises(DataError, match="it names no picture"):
            find_dataset(str(alone))
