"""The tiny models of tests/model, and frozen ones made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ptq4sam.deploy.container import CHECKSUM, DESCRIPTION, signed
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
        # The search for the best grid of a weight takes seconds at 8 bits and is tested elsewhere.
        scheme = scheme.with_overrides("w_qconfig.observer=MinMaxObserver")
        return quantize_sam(sam, items[:2], scheme, quantize_encoder=encoder)

    return run


@pytest.fixture
def describe() -> Callable[..., Any]:
    """The description in a quantized file as text, or its whole metadata."""

    def read(path: Path, *, whole: bool = False) -> Any:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return metadata if whole else metadata[DESCRIPTION]

    return read


@pytest.fixture
def rewrite(describe: Callable[..., Any]) -> Callable[..., None]:
    """Change entries of the description of a quantized file, with the checksum that fits."""

    def write(path: Path, **changes: object) -> None:
        content = json.loads(describe(path))
        del content[CHECKSUM]
        save_file(load_file(path), path, metadata={DESCRIPTION: signed({**content, **changes})})

    return write
