"""Hooks of mkdocs: README is the first page, and links lead to pages or are text.

What pages link outside of docs/ is for readers of the repository: the site has no copy of the code
and no address of the repository, so that the words of such a link stay alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^```(\w+) (?:install|official)$", re.MULTILINE)
"""What the tests know blocks of pages by; a site's highlighter does not understand it."""


def on_files(files: Files, config: Any) -> Files:
    """Add README, as if it lay in docs/."""
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("(docs/", "(")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Keep the words of links that lead to no page, and the language of blocks."""
    folder = posixpath.dirname(page.file.src_uri)

    def kept(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[0] if files.get_file_from_path(target) is not None else link[1]

    return _LINK.sub(kept, _FENCE.sub(r"```\1", markdown))
