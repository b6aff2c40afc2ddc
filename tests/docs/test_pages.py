"""The code in the documentation's pages runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq4sam import families
from ptq4sam.quantization.registry import METHODS, OBSERVERS, QUANTIZERS
from tests.docs.pages import blocks, run
from tests.tiny_runs import REPOSITORY
from tools.write_readme import readme_table, with_table

pytest_plugins = ("tests.tiny_fixtures",)

DOCS = REPOSITORY / "docs"
PAGES = (
    "first-run",
    "commands",
    "reproduce-the-table",
    "your-own-sam",
    "extending",
    "methods",
    "what-is-quantized",
    "memory-and-time",
    "differences",
    "tiny-vit",
    "everything",
    "distillation",
    "tinysam",
)


@pytest.fixture
def checkout(small_nano: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what pages expect of a checkout; what they register is forgotten afterwards."""
    for name in ("exp", "projects"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(families, "VARIANTS", dict(families.VARIANTS))
    for registry in (OBSERVERS, QUANTIZERS, METHODS):
        # Those of ours that were not imported yet would be forgotten with the examples.
        assert all(registry[name] for name in registry.names)
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("ptq4sam_extension_", "plain_"))]:
        del sys.modules[name]


def test_readme_runs(checkout: Path) -> None:
    run(REPOSITORY / "README.md")


def test_readme_has_the_measured_results() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    assert len(readme_table(results)) >= 9
    # Otherwise: python tools/write_readme.py --table-only
    assert with_table(readme, results) == readme


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, checkout: Path) -> None:
    run(DOCS / f"{name}.md")


@pytest.mark.parametrize("name", PAGES)
def test_blocks_that_need_official_weights_say_so(name: str) -> None:
    for block in blocks(DOCS / f"{name}.md"):
        assert block.language in ("python", "bash") or block.file is not None
        assert block.kind in ("", "official", "install")
        official = block.text.startswith("# official weights: ")
        assert official == (block.kind == "official"), block.text


def test_readme_names_every_page_and_links_lead_somewhere() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [name for name in PAGES if f"docs/{name}.md" not in readme] == []
    for page in (REPOSITORY / "README.md", *(DOCS / f"{name}.md" for name in PAGES)):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
