"""The tiny models of tests/model, and frozen ones made of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

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


@pytest.fixture(scope="session")
def quantized_before() -> dict[str, QuantizedSam]:
    """Models that `quantize` made, by weights and scheme; they are copied, never given away."""
    return {}


@pytest.fixture
def quantize(
    quantized_before: dict[str, QuantizedSam],
    sam: Sam,  # noqa: F811
    items: list[CalibrationItem],  # noqa: F811
    make_scheme: Callable[..., Scheme],  # noqa: F811
) -> Callable[..., QuantizedSam]:
    """Quantize the tiny SAM on two pictures: (bits, steps, further content of the scheme).

    What was made of the same weights by the same scheme before is given again, as a copy.
    """

    def run(bits: int = 4, steps: int = 0, *, encoder: bool = True, **more: object) -> QuantizedSam:
        scheme = make_scheme(bits, steps, **more)
        # The search for the best grid of a weight takes seconds at 8 bits and is tested elsewhere.
        scheme = scheme.with_overrides("w_qconfig.observer=MinMaxObserver")
        weights = save(dict(sam.state_dict()))
        key = hashlib.sha256(weights + f"{encoder}\n{scheme.to_yaml()}".encode()).hexdigest()
        if key not in quantized_before:
            quantized_before[key] = quantize_sam(sam, items[:2], scheme, quantize_encoder=encoder)
        return copy.deepcopy(quantized_before[key])

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
