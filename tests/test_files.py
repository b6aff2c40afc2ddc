from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq4sam.errors import DataError
from ptq4sam.files import read_json, replacing, write_json


def test_json_is_written_and_read_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "d"}}
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(value, path)
    content, fingerprint = read_json(path, "file")
    assert content == value
    write_json({**value, "e": 1}, path)
    assert read_json(path, "file")[1] != fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"x": float("nan"), "y": [float("inf"), (1.0,)]}, path)
    assert json.loads(path.read_text()) == {"x": None, "y": [None, [1.0]]}


def test_mappings_are_indented_and_lists_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    lines = {}
    for name, value, compact in (
        ("mapping", {"a": 1}, None),
        ("list", [1, 2], None),
        ("compact mapping", {"a": 1}, True),
        ("long list", [1, 2], False),
    ):
        write_json(value, path, compact=compact)
        lines[name] = len(path.read_text().splitlines())
    assert lines == {"mapping": 3, "list": 1, "compact mapping": 1, "long list": 4}


def _write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of it")
        raise InterruptedError


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json([1], path)
    with pytest.raises(TypeError):
        write_json([object()], path)
    with pytest.raises(InterruptedError):
        _write_half(path)
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_unreadable_json_names_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no list of things .*none\.json"):
        read_json(tmp_path / "none.json", "list of things")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"list of things .*a\.json is not JSON: "):
        read_json(tmp_path / "a.json", "list of things")
