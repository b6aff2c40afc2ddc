"""A tiny quantized SAM that passes the audit, and what the audit tells of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from torch import Tensor

from ptq4sam.model.audit import audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.sam.model import Sam
from tests.model.conftest import scheme_of, tiny_items, tiny_sam

Forward = Callable[[Sam], tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def without_defect() -> QuantizedSam:
    scheme = scheme_of(4)
    return quantize_sam(tiny_sam(), tiny_items()[:2], scheme)


@pytest.fixture
def quantized(without_defect: QuantizedSam) -> QuantizedSam:
    return copy.deepcopy(without_defect)


@pytest.fixture
def told(quantized: QuantizedSam, forward: Forward) -> Callable[[], list[str]]:
    """Gives the findings, a line each."""

    def lines() -> list[str]:
        report = audit(quantized, lambda: forward(quantized))
        return [f"{found.where}: {found.problem}" for found in report.findings]

    return lines
