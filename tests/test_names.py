"""What may know the modules of a network by name, and operators and grids by class."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import ptq4sam

PACKAGE = Path(ptq4sam.__file__).parent
NAMES = re.compile(
    r"\bblocks\\?\.(?!append\b)|\bqkv\b|\blin[12]\b|\bneck\b|token_to_image|cross_attn"
    r"|\bmask_decoder\.transformer\b"
)
OTHER_NETWORKS = ("prompts/", "data/")
"""Detectors have necks too, and people."""
MODELS = {"Sam", "QuantizedSam", "ExportedSam", "CrossAttentions"}
"""Which model was given, or whether a unit is a joint one, may be asked anywhere."""


def sources() -> Iterator[tuple[str, str]]:
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def test_no_module_of_a_network_is_named_outside() -> None:
    found = {}
    for place, text in sources():
        if not place.startswith(("families/", "sam/", *OTHER_NETWORKS)):
            names = NAMES.findall(text)
            if names:
                found[place] = names
    assert not found


def test_the_names_are_those_of_a_network() -> None:
    text = (PACKAGE / "families/sam_vit/image_encoder.py").read_text(encoding="utf-8")
    assert {"qkv", "neck"} <= set(NAMES.findall(text))


@functools.cache
def classes() -> dict[str, set[str]]:
    """Operators, quantizers, observers and grids with the files that define each."""
    bases: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for place, text in sources():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split("[")[0] for base in node.bases}
                files.setdefault(node.name, set()).add(place)
    found = {"nn.Module", "PointGrid"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return {name: files[name] for name in found & files.keys()}


def asked(text: str) -> Iterator[str]:
    """Names of classes in calls of isinstance and issubclass."""
    tree = ast.parse(text) if "isinstance(" in text or "issubclass(" in text else ast.Module()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            yield from (part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name))


def test_nobody_asks_for_the_class_of_an_operator_or_a_grid() -> None:
    # Each in its own file, and operators and quantizers where they are made, may know themselves.
    known = classes()
    found = {
        place: sorted(names)
        for place, text in sources()
        if not place.startswith(("operators/", "quantization/"))
        and (
            names := {
                name
                for name in asked(text)
                if name in known and name not in MODELS and place not in known[name]
            }
        )
    }
    assert not found


def test_the_classes_are_operators_and_grids() -> None:
    assert {
        "QuantizedLayer",
        "PortableLayerNorm2d",
        "AdaRoundQuantizer",
        "AdaptiveGranularityQuantizer",
        "GroupedGrid",
        "MinMaxObserver",
    } <= classes().keys()
    assert set(asked("isinstance(x, nn.Linear | QuantizedLayer)")) == {"nn", "QuantizedLayer"}
