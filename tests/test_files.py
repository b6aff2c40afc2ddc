from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ptq4sam.errors import DataError, in_one_line
from ptq4sam.files import (
    naming,
    read_json,
    refusal_to_write,
    replacing,
    save_picture,
    temporary_folder,
    write_json,
    write_text,
)
from tests.full_disks import FullDisk, full_disk

__all__ = ["full_disk"]


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


def _save_tensors(path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"a": torch.zeros(50_000)}, temporary)


def _write_tensors(path: Path) -> None:
    with replacing(path) as temporary:
        np.save(temporary, np.zeros(50_000))


def _write_folder(path: Path) -> None:
    with temporary_folder(path.parent, "export", path) as folder:
        (folder / "encoder.onnx").write_bytes(bytes(100_000))


_WRITERS = {
    "json": lambda path: write_json(list(range(50_000)), path),
    "text": lambda path: write_text("x" * 100_000, path),
    "picture": lambda path: save_picture(Image.effect_noise((300, 300), 50), path),
    "safetensors": _save_tensors,
    "folder": _write_folder,
}


@pytest.mark.parametrize("kind", _WRITERS)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    kind: str, tmp_path: Path, full_disk: FullDisk
) -> None:
    path = tmp_path / "d" / "a.png"
    with full_disk() as reason:
        path.touch()
        with pytest.raises(OSError, match=r"device|large") as caught:
            _WRITERS[kind](path)
        assert in_one_line(caught.value) == f"{path}: {reason}"
        assert {p.name for p in path.parent.iterdir()} - {"full"} == {"a.png"}


def test_errors_that_know_their_file_keep_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert caught.value.filename == str(tmp_path / "b")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a") as temporary:
        (temporary / "below").touch()
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="of no number") as caught, naming(tmp_path):
        raise OSError("of no number")
    assert in_one_line(caught.value) == f"{tmp_path}: of no number"


def test_a_folder_that_takes_files_is_asked_by_writing(tmp_path: Path) -> None:
    assert refusal_to_write(tmp_path / "new") is None
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    assert refusal_to_write(tmp_path / "file" / "below") == "Not a directory"


def test_lines_end_alike_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text("a\nb\r\nä", tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == "a\nb\r\nä".encode()
