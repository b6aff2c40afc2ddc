"""What an audit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ptq4sam.quantization.levels import described_level

EncoderState = Literal["quantized", "quantized in part", "float"]


@dataclass(frozen=True)
class Finding:
    """Something that a quantized model must not have.

    Attributes:
        where: path of a unit, a layer or a quantizer in the model.
        problem: what was found there, and what was expected.
    """

    where: str
    problem: str


@dataclass(frozen=True)
class AuditReport:
    """What was checked and what was found.

    Attributes:
        layers: layers whose weights were compared with their grid.
        activations: activation quantizers seen at work.
        forwards: forward passes compared bit for bit; 0 where a quantizer has no usable grid.
        findings: violations; empty for an honest quantized model.
        encoder: whether the layers of the image encoder are quantized.
        kept: units that the scheme quantizes to other bits than the rest, or keeps float.
    """

    layers: int
    activations: int
    forwards: int
    findings: tuple[Finding, ...]
    encoder: EncoderState
    kept: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def lines(self) -> list[str]:
        """The report for people."""
        verdict = "passed" if self.passed else f"FAILED with {len(self.findings)} findings"
        head = (
            f"audit {verdict}: {self.layers} layers on their grids, {self.activations} activations "
            f"through a quantizer, {self.forwards} forwards compared, image encoder {self.encoder}"
        )
        kept = [
            f"  {name}: kept {described_level(level)} by the scheme"
            for name, level in self.kept.items()
        ]
        return [head, *kept, *(f"  {found.where}: {found.problem}" for found in self.findings)]
