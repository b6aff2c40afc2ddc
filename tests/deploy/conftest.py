"""The tiny models of tests/model, and frozen ones made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.model.conftest import (  # noqa: F401
    forward,
    items,
    make_scheme,
    sam,
    tiny_variant,
)


@pytest.fixture
def quantize(
    sam: Sam,  # noqa: F811
    items: list[CalibrationItem],  # noqa: F811
    make_scheme: Callable[..., Scheme],  # noqa: F811
) -> Callable[..., QuantizedSam]:
    """Quantize the tiny SAM on two pictures: (bits, steps, further content of the scheme)."""

    def run(bits: int = 4, steps: int = 0, *, encoder: bool = True, **more: object) -> QuantizedSam:
        scheme = make_scheme(bits, steps, **more)
        return quantize_sam(sam, items[:2], scheme, quantize_encoder=encoder)

    return run
