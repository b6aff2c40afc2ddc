"""Only families/ and sam/ may know how the modules of a network are called."""

from __future__ import annotations

import re
from pathlib import Path

import ptq4sam

PACKAGE = Path(ptq4sam.__file__).parent
NAMES = re.compile(
    r"\bblocks\\?\.(?!append\b)|\bqkv\b|\blin[12]\b|\bneck\b|token_to_image|cross_attn"
)
OTHER_NETWORKS = ("prompts/", "data/")
"""Detectors have necks too, and people."""


def test_no_module_of_a_network_is_named_outside() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(("families/", "sam/", *OTHER_NETWORKS)):
            names = NAMES.findall(path.read_text(encoding="utf-8"))
            if names:
                found[place] = names
    assert not found


def test_the_names_are_those_of_a_network() -> None:
    text = (PACKAGE / "families/sam_vit/image_encoder.py").read_text(encoding="utf-8")
    assert {"qkv", "neck"} <= set(NAMES.findall(text))
