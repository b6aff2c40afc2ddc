"""Shipped files by name, beside files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.shipped import CONFIGS, ROOT, SCHEMES, SWEEPS, find, located, shipped_names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_scheme_by_its_name() -> None:
    assert find("ptq4sam-l44", SCHEMES, "scheme") == ROOT / "exp/ptq4sam-l44.yaml"
    assert Scheme.from_yaml("ptq4sam-l44") == Scheme.from_yaml(ROOT / "exp" / "ptq4sam-l44.yaml")


def test_a_scheme_of_a_folder_by_its_name() -> None:
    assert find("tinysam/w8a8", SCHEMES, "scheme") == ROOT / "exp/tinysam/w8a8.yaml"


def test_a_name_with_a_suffix_or_in_capitals_names_what_ships() -> None:
    for given in ("ptq4sam-l44.yaml", "ptq4sam-l44.yml"):
        with pytest.raises(ConfigError, match=rf"no file {given} here: .* is named ptq4sam-l44$"):
            Scheme.from_yaml(given)
    with pytest.raises(ConfigError, match=r"named 'PTQ4SAM-L44': did you mean ptq4sam-l44\?"):
        Scheme.from_yaml("PTQ4SAM-L44")


def test_a_path_of_a_checkout_from_any_folder() -> None:
    given = Path("exp/config66.yaml")
    assert find(given, SCHEMES, "scheme") == ROOT / given
    assert located(CONFIGS) == ROOT / CONFIGS


def test_what_is_here_goes_before_what_ships() -> None:
    own = Path("exp/config66.yaml")
    own.parent.mkdir()
    own.write_text("calibrate: 3")
    Path("bimodal").write_text("grid: {}")
    assert find(own, SCHEMES, "scheme") == own
    assert find("bimodal", SWEEPS, "sweep") == Path("bimodal")


def test_a_file_that_is_not_there_stays_what_was_asked_for() -> None:
    for given in ("own.yaml", "folder/own", "/nowhere/exp/config66.yaml"):
        assert find(given, SCHEMES, "scheme") == Path(given)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no scheme is named 'ptq4sam-l4': did you mean ptq4sam"):
        Scheme.from_yaml("ptq4sam-l4")
    with pytest.raises(ConfigError, match=r"did you mean bimodal\? there are bimodal, bits"):
        find("bimodel", SWEEPS, "sweep")


def test_configurations_have_names_and_their_bases_have_none() -> None:
    names = shipped_names(CONFIGS)
    assert names["yolo_l-sam-vit-b"] == ROOT / CONFIGS / "yolox/yolo_l-sam-vit-b.py"
    assert "coco" not in names
    # A name means one file.
    assert len(names) == len(list((ROOT / CONFIGS).glob("[!_]*/*.py")))
