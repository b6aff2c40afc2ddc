"""Golden vectors: recorded inputs and outputs of the method, as cases of a folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEARCHED = 1e-3
"""Relative tolerance of a scale that is the end point of a numeric search, where it is the same."""
NOT_WORSE = 1.02
"""How many times the recorded objective another end point may have.

Bounded minimisation of a jagged function stops in one of many minima, in which one is decided by
the last bits of sums. The description of the recorded cases allows 1.001, which ours keeps in all
of its cases; in cases recorded elsewhere its end point was up to 1.8 % worse. To come below is a
matter of another search, not of the arithmetic that is compared here.
"""


@dataclass(frozen=True)
class GoldenCase:
    """One case: its parameters, and its arrays by name (without the case's key).

    `case["x"]` is a tensor; `"x" in case` asks for it; `case.folder("sd")` gives all arrays named
    sd/NAME as {NAME: tensor}; `case.numbered("in")` gives in0, in1, ... in order.
    """

    key: str
    group: str
    parameters: dict[str, Any]
    directory: Path

    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(_arrays(self.directory)[self.key])

    def __contains__(self, name: str) -> bool:
        return name in _arrays(self.directory)[self.key]

    def __getitem__(self, name: str) -> Tensor:
        return _arrays(self.directory)[self.key][name].clone()

    def folder(self, prefix: str) -> dict[str, Tensor]:
        """All arrays named PREFIX/NAME, by NAME."""
        start = prefix + "/"
        return {n.removeprefix(start): self[n] for n in self.names() if n.startswith(start)}

    def numbered(self, prefix: str) -> list[Tensor]:
        """PREFIX0, PREFIX1, ... as far as they go."""
        result: list[Tensor] = []
        while f"{prefix}{len(result)}" in self:
            result.append(self[f"{prefix}{len(result)}"])
        return result


def cases(directory: Path, *groups: str) -> Iterator[GoldenCase]:
    """The cases of a folder that belong to the groups, in their order."""
    for entry in _entries(directory):
        if entry["group"] in groups:
            yield GoldenCase(entry["key"], entry["group"], entry, directory)


@functools.cache
def _entries(directory: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((directory / "reference.json").read_text())
    return entries


@functools.cache
def _arrays(directory: Path) -> dict[str, dict[str, Tensor]]:
    keys = {entry["key"] for entry in _entries(directory)}
    result: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
    with np.load(directory / "reference.npz") as file:
        for full_name in file.files:
            # Keys look like observer_12 and names like x or tau_scales: the longest key counts.
            parts = full_name.split("_")
            for end in range(len(parts) - 1, 0, -1):
                key = "_".join(parts[:end])
                if key in keys:
                    result[key]["_".join(parts[end:])] = torch.from_numpy(file[full_name])
                    break
    return result
