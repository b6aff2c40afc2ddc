"""The page of methods has a row for every name that a scheme can give."""

from __future__ import annotations

import re

import pytest

from ptq4sam.quantization.registry import GRIDS, METHODS, OBSERVERS, QUANTIZERS, Registry
from tests.tiny_runs import REPOSITORY


@pytest.mark.parametrize(
    "registry", [OBSERVERS, QUANTIZERS, GRIDS, METHODS], ids=lambda registry: registry.kind
)
def test_every_name_of_ours_has_a_row(registry: Registry[object]) -> None:
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert len(registry._published) > 3
    assert set(registry._published) - named == set()
