"""Python configuration files: bases, merging, and nothing that runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.runs.configs.experiment import DetectorConfig, ExperimentConfig
from ptq4sam.runs.configs.literals import load_config, merge


def write(folder: Path, **files: str) -> Path:
    """Write name.py for each file; the path of the last."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.write_text(text)
    return path


def load(folder: Path, text: str, *options: str) -> dict[str, Any]:
    return load_config(write(folder, config=text), options)


def test_literals_names_and_arithmetic(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        '"""What it is."""\n'
        "a = 1\n"
        "b: int = -a + 2 * 8 // 3 % 4\n"
        "c = dict(x=[1, 2.5, None], y=(True, not True), **{'z': 'text'})\n"
        "d = {'k': c['x'][1], **c}\n"
        "e = list((1, 2)) + [3]\n"
        "_folder = 'ckpt/'\n"
        "f = _folder + 'sam.pth'\n"
        "g = a / 4\n",
    )
    assert config["b"] == -1 + 2 * 8 // 3 % 4
    assert config["c"] == {"x": [1, 2.5, None], "y": (True, False), "z": "text"}
    assert config["d"]["k"] == 2.5
    assert config["e"] == [1, 2, 3]
    assert config["f"] == "ckpt/sam.pth"
    assert config["g"] == 0.25
    assert "_folder" not in config


def test_bases_merge_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, root="m = dict(a=1, b=dict(c=2, d=3))\nn = [1, 2]\nkept = 'yes'\n")
    path = write(tmp_path / "deep", child="_base_ = '../root.py'\nm = dict(b=dict(c=5))\nn = [3]\n")
    assert load_config(path) == {"m": {"a": 1, "b": {"c": 5, "d": 3}}, "n": [3], "kept": "yes"}


def test_grandparents_and_several_bases(tmp_path: Path) -> None:
    write(
        tmp_path,
        first="a = 1\n",
        second="_base_ = './first.py'\nb = {{_base_.a}} + 1\n",
        other="c = 3\n",
    )
    config = load(tmp_path, "_base_ = ['second.py', 'other.py']\nd = {{_base_.c}}\n")
    assert config == {"a": 1, "b": 2, "c": 3, "d": 3}


def test_reference_into_a_base(tmp_path: Path) -> None:
    write(tmp_path, base="m = dict(a=dict(b=7))\n")
    text = (
        "_base_ = 'base.py'\nx = {{_base_.m.a.b}}\ny = '{{_base_.m.a.b}}'\nz = [{{ _base_.m }}]\n"
    )
    config = load(tmp_path, text)
    assert (config["x"], config["y"], config["z"]) == (7, 7, [{"a": {"b": 7}}])


def test_delete_replaces_instead_of_merging(tmp_path: Path) -> None:
    write(tmp_path, base="m = dict(a=1, b=2)\nn = 4\n")
    config = load(
        tmp_path, "_base_ = 'base.py'\nm = dict(_delete_=True, c=3)\nn = dict(_delete_=True, x=1)\n"
    )
    assert config == {"m": {"c": 3}, "n": {"x": 1}}


def test_merge_leaves_its_arguments_alone() -> None:
    base, child = {"m": {"a": 1}}, {"m": {"_delete_": True, "b": 2}}
    assert merge(base, child) == {"m": {"b": 2}}
    assert base == {"m": {"a": 1}}
    assert child == {"m": {"_delete_": True, "b": 2}}


def test_options(tmp_path: Path) -> None:
    text = "m = dict(a=1, b=[dict(c=2), dict(c=3)])\nname = 'x'\n"
    config = load(
        tmp_path, text, "m.a=4e-5", "m.b.1.c=[1, 2]", "name=ckpt/b.pth", "m.new=none", "flag=true"
    )
    assert config == {
        "m": {"a": 4e-5, "b": [{"c": 2}, {"c": [1, 2]}], "new": None},
        "name": "ckpt/b.pth",
        "flag": True,
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("n.a=1", "n: unknown key; known are m"),
        ("m.x.y=1", "m.x: unknown key"),
        ("m.a.y=1", "m.a: 1 has no field 'y' to set"),
        ("m.b.2=1", "m.b.2: index 2 of 2 items"),
        ("m", "write it as key=value"),
    ],
)
def test_impossible_options(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "m = dict(a=1, b=[1, 2])\n", option)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "import os",
        "from os import system",
        "open('ran', 'w')",
        "x = open('ran', 'w')",
        "x = __import__('os').system('touch ran')",
        "x = dict.__subclasses__()",
        "x = ().__class__",
        "x = (lambda: 1)()",
        "x = [i for i in (1, 2)]",
        "x = f'{1}'",
        "x = 1 if True else 2",
        "x = 1 < 2",
        "x = 9 ** 9",
        "x = 1 << 9",
        "x = 'a' * 9",
        "x = '%s' % 9",
        "x = [1] * 9",
        "x = {1, 2}",
        "x = {{1}}",
        "x = unknown",
        "x = -'text'",
        "x = 1 / 0",
        "x = {}['missing']",
        "x = dict([1])",
        "x = dict(**{1: 2})",
        "x = y = 1",
        "x, y = 1, 2",
        "x += 1",
        "x: int",
        "x.y = 1",
        "del x",
        "for i in ():\n    pass",
        "def f():\n    pass",
        "x = '{{ fileDirname }}'",
        "x = {{_base_.missing}}",
        "_base_ = 3",
        "_base_ = ['missing.py']",
        "_base_ = 'mmdet::yolox/yolox_l.py'",
    ],
)
def test_anything_but_literals_is_an_error_with_its_line(
    tmp_path: Path, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"# first line\n{statement}\n")
    assert f"{tmp_path / 'config.py'}:2: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (1\n", "config.py:1: not Python:"),
        ("x = \0\n", "config.py"),
        ("x = " + "(" * 5000 + ")" * 5000 + "\n", "config.py"),
        ("x = " + "-" * 50000 + "1\n", "config.py"),
        ("x = " + "1 + " * 50000 + "1\n", "config.py"),
    ],
)
def test_files_that_are_not_python(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.py")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "latin.py")


def test_bases_of_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, a="_base_ = 'b.py'\n", b="_base_ = 'a.py'\n")
    with pytest.raises(ConfigError, match=r"bases of each other: b\.py -> a\.py -> b\.py"):
        load_config(path)


def test_one_name_in_two_bases(tmp_path: Path) -> None:
    write(tmp_path, a="x = 1\n", b="x = 2\n")
    with pytest.raises(ConfigError, match="x in more than one base"):
        load(tmp_path, "_base_ = ['a.py', 'b.py']\n")


def test_dictionary_over_something_else(tmp_path: Path) -> None:
    write(tmp_path, base="m = dict(a=1)\n")
    with pytest.raises(ConfigError, match=r"config\.py: m\.a: 1 in the base, .*_delete_=True"):
        load(tmp_path, "_base_ = 'base.py'\nm = dict(a=dict(b=2))\n")


EXPERIMENT = (
    "sam = dict(type='vit_b', checkpoint='ckpt/sam_vit_b_01ec64.pth')\n"
    "detector = dict(type='onnx', checkpoint='yolox.onnx')\n"
    "data = dict(images='val2017', annotations='val.json')\n"
)


def test_an_experiment(tmp_path: Path) -> None:
    path = write(tmp_path, config=EXPERIMENT + "prompting = dict(max_per_image=300)\n")
    experiment = ExperimentConfig.from_file(path, "data.limit=5")
    assert experiment.sam.checkpoint == Path("ckpt/sam_vit_b_01ec64.pth")
    assert experiment.data.limit == 5
    assert experiment.calibration is None
    assert experiment.prompting == Prompting(max_per_image=300)
    assert ExperimentConfig.from_dict(experiment.to_dict()) == experiment


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sam.typ='vit_b'", "sam.typ: unknown key; did you mean 'type'?"),
        ("sam.type='vit_x'", "sam.type: 'vit_x' given, one of vit_b, vit_l, vit_h, vit_nano"),
        ("sam.checkpoint=3", "sam.checkpoint: 3 given, a path is needed"),
        ("model=1", "model: unknown key"),
        ("detector.type='mmdet'", "detector.config: missing; a mmdet detector needs one"),
        ("detector.checkpoint=None", "detector.checkpoint: missing; a onnx detector needs a file"),
        ("data.limit=0", "data.limit: 0 given, allowed: 1 or more"),
        ("data=None", "data: None given, keys and values are needed"),
        ("prompting={'score_threshold': 2}", "prompting.score_threshold: 2.0 given, allowed: 0"),
        ("prompting={'max_per_image': 0}", "prompting.max_per_image: 0 given, allowed: 1"),
    ],
)
def test_impossible_experiments(tmp_path: Path, option: str, message: str) -> None:
    path = write(tmp_path, config=EXPERIMENT)
    with pytest.raises(ConfigError) as caught:
        ExperimentConfig.from_file(path, option)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_missing_section(tmp_path: Path) -> None:
    path = write(tmp_path, config="sam = dict(type='vit_b')\n")
    with pytest.raises(ConfigError, match="detector: missing; a section is needed"):
        ExperimentConfig.from_file(path)


def test_prompts_argument_of_a_detector() -> None:
    path = Path("boxes.json")
    assert DetectorConfig("results", path).prompts == "boxes.json"
    assert DetectorConfig("onnx", Path("x.onnx")).prompts == "onnx:x.onnx"
    assert DetectorConfig("yolox", Path("x.pth")).prompts == "yolox:x.pth"
    assert DetectorConfig("ground-truth").prompts == "ground-truth"
    yolox = DetectorConfig("mmdet", Path("x.pth"), config="yolox.py")
    assert yolox.prompts == "mmdet:yolox.py:x.pth"
    ssd = DetectorConfig("torchvision", config="ssd300_vgg16")
    assert ssd.prompts == "torchvision:ssd300_vgg16"
    assert replace(ssd, checkpoint=Path("a.pth")).prompts == "torchvision:ssd300_vgg16:a.pth"
    assert DetectorConfig("transformers", Path("folder")).prompts == "transformers:folder"
    assert DetectorConfig("hdetr", Path("h.pth")).prompts == "hdetr:h.pth"
    assert DetectorConfig("focalnet_dino", Path("d.pth")).prompts == "focalnet-dino:d.pth"
