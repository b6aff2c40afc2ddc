"""What tests share: a session is another one's only if everything that it was opened with is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.deploy.sessions import opened_once


class Opened:
    """Stands for a session; knows what it was made of."""

    def __init__(
        self, path: Path, outputs: list[str], precision: str = "f32", products: str | None = None
    ) -> None:
        self.made_of = path.read_text(), list(outputs), precision, products


def test_other_files_and_settings_are_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", sys)
    once = opened_once(Opened.__init__)
    path = tmp_path / "graph.onnx"

    def opened(content: str, *settings: object) -> Opened:
        path.write_text(content)
        session = Opened.__new__(Opened)
        once(session, path, *settings)
        return session

    first = opened("a", ["y"])
    assert opened("a", ["y"]).made_of is first.made_of
    for content, *settings in (
        ("b", ["y"]),
        ("a", ["z"]),
        ("a", ["y"], "bf16"),
        ("a", ["y"], "f32", "int8"),
    ):
        found = opened(content, *settings).made_of
        assert found[:2] == (content, settings[0])
        assert found != first.made_of
    # Weights in a file beside it.
    path.with_suffix(".bin").write_bytes(b"1")
    assert opened("a", ["y"]).made_of is not first.made_of
    path.with_suffix(".bin").unlink()
    assert opened("a", ["y"]).made_of is first.made_of
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert opened("a", ["y"]).made_of is not first.made_of
