"""One word for one thing on the command line; old ones still work, and nothing is said of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ptq4sam.cli import build_parser

RUN = ["--images", "i", "--prompts", "b.json"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["everything", "--images", "i", "--out", "o"], ["--output", "o"]),
        (["evaluate", *RUN, "--out", "o"], ["--output", "o"]),
        (["table", "coco", "--out", "a.md", "b.csv"], ["--output", "a.md", "b.csv"]),
        (["prompts", "--detector", "d", "--dataset", "coco", "--out", "o"], ["--images", "coco"]),
        (["evaluate", *RUN, "--scheme-options", "a=1", "b=2"], ["--set", "a=1", "b=2"]),
        (
            ["everything", "--images", "i", "--output", "o", "--options", "a=1"],
            ["--set", "a=1"],
        ),
    ],
)
def test_old_words(old: list[str], new: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flag = {"--images": "--dataset", "--output": "--out"}.get(new[0])
    start = old.index(flag) if flag else next(i for i, w in enumerate(old) if "options" in w)
    renamed = [*old[:start], *new, *old[start + len(new) :]]
    assert build_parser().parse_args(old) == build_parser().parse_args(renamed)
    assert capsys.readouterr() == ("", "")


def test_set_can_be_given_again() -> None:
    asked = ["evaluate", *RUN, "--set", "a=1", "--scheme-options", "b=2", "--set", "c=3"]
    assert build_parser().parse_args(asked).set == ["a=1", "b=2", "c=3"]
    assert build_parser().parse_args(["evaluate", *RUN]).set == []


@pytest.mark.parametrize("verb", ["evaluate", "everything", "prompts", "verify", "audit", "table"])
def test_help_has_the_new_words_and_one_device(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for old in ("--out ", "--options", "--scheme-options", "--dataset"):
        assert old not in told
    assert "cpu or cuda:0; default: CUDA where there is one" in told


def _every_verb() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(verbs.choices)


def test_help_says_what_a_verb_does_and_what_each_flag_is_for() -> None:
    verbs = _every_verb()
    assert len(verbs) > 15
    assert [name for name, verb in verbs.items() if not verb.description] == []
    untold = [
        (name, flag.dest) for name, verb in verbs.items() for flag in verb._actions if not flag.help
    ]
    assert untold == []


def test_a_data_set_in_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq4sam.commands.requests import data_pair

    monkeypatch.chdir(tmp_path)
    scored, calibrated = (
        data_pair("", Path("coco"), None),
        data_pair("calibration-", Path("coco"), None),
    )
    assert scored is not None
    assert calibrated is not None
    assert scored.images == Path("data/coco/val2017")
    assert calibrated.images == Path("data/coco/train2017")
    config = tmp_path / "mine.py"
    config.write_text("data = dict(images='pictures', limit=3, recursive=True)")
    named = data_pair("", config, None)
    assert named is not None
    assert (named.images, named.limit, named.recursive) == (Path("pictures"), 3, True)
    # A folder that is there means itself.
    (tmp_path / "coco").mkdir()
    folder = data_pair("", Path("coco"), None)
    assert folder is not None
    assert (folder.images, folder.annotations) == (Path("coco"), None)
