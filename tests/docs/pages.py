"""Pages of documentation as programs: their fenced blocks, and how a test runs them.

The word behind the language of a block says what becomes of it: nothing, it runs; "official", it
needs official weights, so that only its flags are read; "install", it is not looked at.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptq4sam.cli import build_parser, main

_FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.(?:py|yaml))\n")

# What a reader runs in minutes runs here in seconds.
_SMALL = (
    (r"--train \d+", "--train 2"),
    (r"--val \d+", "--val 2"),
    (r"--limit \d+", "--limit 1"),
    (r"--steps \d+", "--steps 2"),
    (r"--calibration-size \d+", "--calibration-size 2"),
    (r"--jobs \d+", "--jobs 1"),
    (r"--preset \w+", "--set recon.iters=2"),
    (r"recon\.iters=\d+", "recon.iters=2"),
    (r"points_per_side=\d+", "points_per_side=2"),
    (r"calibrate=\d+", "calibrate=2"),
    (r"limit=\d+", "limit=1"),
    (r'scheme="[\w-]+"', 'scheme="minmax44"'),
    (r", \d+, seed=", ", 2, seed="),
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: "python", "yaml" or "bash".
        kind: "", "official" or "install".
        text: what is in it.
    """

    language: str
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that the reader saves it in, if the first line says one."""
        named = _FILE.match(self.text)
        return None if named is None else named[1]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    return [Block(*(part or "" for part in found)) for found in _FENCE.findall(page.read_text())]


def commands(block: Block) -> list[str]:
    """The lines of a bash block without comments."""
    return [line for line in block.text.splitlines() if line and not line.startswith("#")]


def run(page: Path) -> None:
    """Run a page in the current folder."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.kind == "install":
            continue
        if block.language == "bash":
            for command in commands(block):
                _run_command(command, only_read=block.kind == "official")
        elif block.file is not None:
            Path(block.file).write_text(block.text)
        else:
            exec(compile(small(block.text), page.name, "exec"), names)


def _run_command(command: str, only_read: bool) -> None:
    words = shlex.split(command if only_read else small(command))
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    assert words.pop(0) == "ptq4sam", f"{command}: only ptq4sam is run in pages"
    if only_read:
        build_parser().parse_args(words)
        return
    if words[0] in ("quantize", "evaluate") and "--scheme" in words:
        words = _quick(words)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        assert main(words) == 0, command


def _quick(words: list[str]) -> list[str]:
    """The same for the decoder alone and few boxes, with ranges of weights that need no search."""
    words = [word for word in words if word != "--decoder-only"]
    words = ["--set" if word == "--scheme-options" else word for word in words]
    if "--set" not in words:
        words.append("--set")
    # Before what the page sets, which goes before it.
    words.insert(words.index("--set") + 1, "w_qconfig.observer=MinMaxObserver")
    return [words[0], "--decoder-only", "--max-per-image", "4", *words[1:]]


def small(text: str) -> str:
    """The same code or command with numbers that run in seconds."""
    for long, short in _SMALL:
        text = re.sub(long, short, text)
    return text
