"""The map names what there is, and every decision says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_runs import REPOSITORY

DOCS = REPOSITORY / "docs"
DECISIONS = sorted(path for path in (DOCS / "decisions").glob("*.md") if path.name != "README.md")


def test_the_map_names_every_folder_and_files_that_are_there() -> None:
    text = (DOCS / "architecture.md").read_text()
    package = REPOSITORY / "ptq4sam"
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", text))
    assert len(named) > 40
    # A name without a folder is beside the file before it, or beside the folders.
    missing = [one for one in named if not (package / one).exists() and "/" in one]
    assert missing == []
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert folders - named == set()


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_a_date_a_choice_a_reason_and_a_price(path: Path) -> None:
    said = [".+".join((rf"\*\*{word}\.\*\* ", "")) for word in ("Choice", "Reason", "Given up")]
    pattern = "".join((r"# .+\n\n\d{4}-\d\d-\d\d\n\n", *said))
    assert re.fullmatch(pattern, path.read_text(), re.DOTALL)


def test_every_decision_is_listed() -> None:
    listed = re.findall(r"\]\((\S+)\.md\)", (DOCS / "decisions" / "README.md").read_text())
    assert sorted(listed) == [path.stem for path in DECISIONS]
