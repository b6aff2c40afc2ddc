"""What the command says when it is interrupted."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

from ptq4sam.cli import main

AGAIN = ": the same command goes on with it"
WITH_RESUME = ": the same command with --resume goes on with it"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("sweep bits", AGAIN),
        ("table coco", AGAIN),
        (
            "quantize --output q --scheme minmax44",
            WITH_RESUME,
        ),
        ("quantize --output q --scheme minmax44 --resume", AGAIN),
        (
            "evaluate --images i --scheme minmax44",
            WITH_RESUME,
        ),
        ("evaluate --images i", ""),
        ("distil --output d", WITH_RESUME),
        ("cost", ""),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(
    words: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *flags = words.split()

    def interrupt(_parsed: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"ptq4sam.commands.{verb}"), "run", interrupt)
    monkeypatch.setattr("ptq4sam.cli.refuse_overwriting", lambda _parsed: None)
    assert main([verb, *flags]) == 130
    assert capsys.readouterr().err == f"interrupted{told}\n"
