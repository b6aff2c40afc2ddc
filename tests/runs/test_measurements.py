"""Measured values on disk: what is known is not measured again, what is foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq4sam.errors import ConfigError, DataError
from ptq4sam.model.journal import INDEX, Journal
from ptq4sam.runs.measurements import Measurements


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    first = Measurements(path, {"seed": "1"}, resume=False)
    assert first.value("a", lambda: 0.1) == 0.1
    again = Measurements(path, {"seed": "1"}, resume=True)
    assert again.value("a", lambda: 0.2) == 0.1
    with pytest.raises(ConfigError, match="seed differ"):
        Measurements(path, {"seed": "2"}, resume=True)


@pytest.mark.parametrize("content", [[], {}, {"fingerprint": {}}, {"fingerprint": 1, "values": {}}])
def test_a_foreign_file_is_refused_in_one_line(content: object, tmp_path: Path) -> None:
    for name in ("measurements.json", INDEX):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"measurements\.json is no file of measurements: .*"):
        Measurements(tmp_path / "measurements.json", {}, resume=True)
    with pytest.raises(ConfigError, match=r"journal\.json is no journal: .* delete it"):
        Journal(tmp_path, {}, resume=True)


def test_a_cut_file_is_called_damaged(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"fingerprint": {')
    with pytest.raises(DataError, match="is not JSON"):
        Journal(tmp_path, {}, resume=True)
