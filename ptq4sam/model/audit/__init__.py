"""Proof that a quantized model is one: deterministic, on its grids, with nothing left out.

The check does not ask the insertion code what it did. It walks every module and compares it with
the description of its family (`modules`), compares the quantizers with the scheme (`quantizers`),
and watches the operands of every product while the model computes (`products`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq4sam.model.audit.modules import encoder_state, expected_activations, missed_modules
from ptq4sam.model.audit.products import WatchedPass
from ptq4sam.model.audit.quantizers import (
    other_than_the_scheme,
    switched_or_dropping,
    unusable_parameters,
    weights_off_grid,
)
from ptq4sam.model.audit.report import AuditReport, EncoderState, Finding
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import quantized_layers

__all__ = [
    "AuditReport",
    "EncoderState",
    "Finding",
    "audit",
    "encoder_state",
    "expected_activations",
]


@torch.no_grad()
def audit(sam: QuantizedSam, run: Callable[[], Sequence[Tensor]]) -> AuditReport:
    """Check a frozen model.

    Args:
        sam: the model.
        run: one forward pass of a picture with prompts, giving the tensors to compare.
    """
    findings = [*missed_modules(sam), *other_than_the_scheme(sam), *switched_or_dropping(sam)]
    unusable = list(unusable_parameters(sam))
    findings += unusable
    watched = WatchedPass(sam)
    forwards = 0
    if not unusable:
        # Without a grid nothing can be computed on it.
        findings += weights_off_grid(sam)
        # The watched pass comes second: what is asked and compiled once is done by then.
        first, second = run(), watched.run(run)
        forwards = 2
        known = {found.where for found in findings}
        findings += watched.findings(known)
        if len(first) != len(second) or not all(map(torch.equal, first, second)):
            findings.append(Finding("forward", "two passes on the same input differ"))
    expected, found = expected_activations(sam), len(watched.reaches)
    if found != expected:
        problem = f"{found} have a quantizer, expected the {expected} that are listed"
        findings.append(Finding("activations", problem))
    return AuditReport(
        layers=len(quantized_layers(sam)),
        activations=found,
        forwards=forwards,
        findings=tuple(findings),
        encoder=encoder_state(sam),
        kept=dict(sam.scheme.units),
    )
