"""Flags are named where they are defined: messages of everything below speak of settings."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq4sam.cli import build_parser, main
from ptq4sam.commands.flags import MODELS
from ptq4sam.families import VARIANTS
from tests.tiny_runs import REPOSITORY

PACKAGE = REPOSITORY / "ptq4sam"
NAMED_IN = ("cli.py", "commands", "solver")
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of a parser and of its verbs."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags.update(*map(flags_of, action.choices.values()))
    return flags


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module, docstrings among them, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_no_module_below_the_commands_names_a_flag() -> None:
    ours = flags_of(build_parser())
    assert {"--work-dir", "--resume", "--scheme"} <= ours
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {flag}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in NAMED_IN
        for line, words in words_of(path)
        for flag in _FLAG.findall(words)
        if flag in ours
    ]
    assert found == []


def test_help_names_every_sam() -> None:
    assert sorted(MODELS) == sorted(VARIANTS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["evalute"], "did you mean evaluate?; see ptq4sam --help"),
        (["evaluate", "--images", "x", "--imagse", "y"], "--imagse y: did you mean --images?; see"),
        (
            ["evaluate", "--images", "x", "--limit", "all"],
            "invalid int value: 'all'; see ptq4sam ev",
        ),
        (["quantize", "--output", "x", "--method", "nncff"], "did you mean nncf?; see"),
        (["evaluate"], "required: --images; see ptq4sam evaluate --help"),
        ([], "required: VERB; see ptq4sam --help"),
    ],
)
def test_flags_that_are_none_are_one_line(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
