"""What users name in the environment, and what their files say wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptq4sam import extensions
from ptq4sam.errors import ConfigError
from ptq4sam.extensions import (
    EXTENSIONS,
    extensions_fingerprint,
    fault_of_extension,
    load_extensions,
    told_of_extensions,
)
from ptq4sam.quantization.registry import METHODS

CLIP = """
from ptq4sam.methods.method import METHODS, Method
@METHODS.register("clip-share")
class ClipShare(Method):
    def after_ranges(self, calibration):
        return changd
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes extensions, all of which the environment names; forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(EXTENSIONS, "")
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    monkeypatch.setattr(extensions, "_REGISTERED", {})
    before = set(sys.modules)

    def add(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        named = filter(None, (os.environ[EXTENSIONS], name))
        monkeypatch.setenv(EXTENSIONS, os.pathsep.join(named))
        return path

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("ptq4sam_extension"):
            del sys.modules[module]


def refusal(named: str) -> str:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(EXTENSIONS, named)
        with pytest.raises(ConfigError) as caught:
            load_extensions()
    told = str(caught.value)
    assert told.startswith(f"{EXTENSIONS} names {named}, ")
    return told.removeprefix(f"{EXTENSIONS} names {named}, ")


def test_what_is_not_there_names_the_nearest(write: Write) -> None:
    write("mine/clip_share.py", "")
    write("mine/clip.yaml", "")
    near = "did you mean mine/clip_share.py?"
    assert refusal("mine/clip_shar.py") == f"which is not there: {near}"
    assert refusal("mine/clip_share") == f"which is not there: {near}"
    advice = "give a module or the path of a .py file"
    assert refusal("gone/clip_share.py") == f"which is not there: {advice}"
    assert refusal("mine/clip.yaml").startswith("which is no .py file: ")
    assert refusal("no_such_module").startswith("a module that Python does not find: give")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 1\nimport no_such", "line 2: ModuleNotFoundError: No module named 'no_such'"),
        ("import clip_shares", "line 1: ModuleNotFoundError: No module named 'clip_shares'"),
        ("a = 1\n\nb = c", "line 3: NameError: name 'c' is not defined"),
        ("a = 1\ndef f(:\n    pass", "line 2: SyntaxError: invalid syntax"),
        (CLIP.replace("after_ranges", "after_range"), "line 3: method 'clip-share' (ClipShare)"),
    ],
)
def test_an_error_inside_names_its_line(write: Write, text: str, told: str) -> None:
    path = write("clip_shares.py", text)
    assert refusal(str(path)).startswith(f"which has an error at {told}")


def test_what_was_read_and_what_it_registers_is_told(write: Write) -> None:
    write("mine/nothing.py", "")
    write("mine/clip.py", CLIP)
    with pytest.raises(ConfigError) as caught:
        METHODS.require("mine", "methods")
    told = str(caught.value)
    with pytest.raises(ConfigError, match=r"did you mean 'clip-share'\? mine/nothing\.py was read"):
        METHODS.require("clip-shar", "methods")
    assert "; mine/nothing.py was read and registers nothing; mine/clip.py was read and " in told
    assert told.endswith(
        "registers method clip-share: yours needs @METHODS.register('mine') above its class"
    )


def test_without_any_the_variable_is_named(write: Write) -> None:
    assert told_of_extensions() == f"one of your own needs {EXTENSIONS}=FILE"


def test_a_fault_is_told_with_whose_it_is_and_where(write: Write) -> None:
    write("clip.py", CLIP)
    load_extensions()
    method = METHODS["clip-share"](None)
    with pytest.raises(NameError) as caught:
        method.after_ranges(None)
    told = "method clip-share (clip.py:6): NameError: name 'changd' is not defined"
    assert fault_of_extension(caught.value) == told
    with pytest.raises(ZeroDivisionError) as ours:
        _ = 1 / 0
    assert fault_of_extension(ours.value) is None


def test_a_changed_extension_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.py"
    monkeypatch.setenv(EXTENSIONS, "")
    assert extensions_fingerprint() == ""
    monkeypatch.setenv(EXTENSIONS, str(mine))
    found = []
    for text in ("rate = 1\n", "rate = 2\n", "rate = 1\n"):
        mine.write_text(text)
        found.append(extensions_fingerprint())
    assert found[0] == found[2] != found[1]
    # A module by its name, and one that is not there.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(EXTENSIONS, "mine")
    assert extensions_fingerprint() == found[0]
    monkeypatch.setenv(EXTENSIONS, "no_such_module")
    assert extensions_fingerprint() not in ("", *found)
