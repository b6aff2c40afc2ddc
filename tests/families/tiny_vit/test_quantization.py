"""TinyViT SAMs are quantized as any other: units, audit, more bits nearer, files, fold of signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4sam.families import build_sam
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.tiny_runs import SCHEMES

SIDE = 64


@pytest.fixture(scope="module")
def nano() -> Sam:
    torch.manual_seed(0)
    return build_sam("tiny_vit_nano", SIDE)


@pytest.fixture(scope="module")
def items() -> list[CalibrationItem]:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[4.0, 4, 40, 40], [10, 20, 60, 50]])
    return [
        CalibrationItem(torch.randn(1, 3, SIDE, SIDE, generator=generator), boxes) for _ in range(2)
    ]


def scheme(name: str, *more: str) -> Scheme:
    read = Scheme.from_yaml(SCHEMES / f"{name}.yaml")
    quick = ["w_qconfig.observer=MinMaxObserver", *more]
    return read.with_overrides(*quick, *(["recon.iters=2"] if read.recon is not None else []))


def forward(sam: Sam, item: CalibrationItem) -> tuple[Tensor, ...]:
    features = sam.embed(item.pixels)
    return (*features, *sam.decode(features, None, item.boxes, None, True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ptq4sam-s44", "ptq4sam-l44", "w8a8"])
def test_a_quantized_model_passes_the_audit(
    nano: Sam, items: list[CalibrationItem], name: str
) -> None:
    with torch.enable_grad():
        quantized = quantize_sam(nano, items, scheme(name))
    report = audit(quantized, lambda: forward(quantized, items[0]))
    assert report.passed, "\n".join(report.lines())
    names = [unit for unit, _ in model_units(quantized)]
    assert len(names) == len(set(names))
    # Stem, 1 block of convolutions, 3 mergings, 6 blocks of 3 units, neck; the decoder's 9.
    assert len(names) == 1 + 1 + 3 + 6 * 3 + 1 + 9
    assert {layer for layer, _ in quantized_layers(quantized)} >= {
        "image_encoder.patch_embed.seq.2.c",
        "image_encoder.layers.0.blocks.0.conv2.c",
        "image_encoder.layers.3.blocks.1.local_conv.c",
    }


@torch.no_grad()
def test_more_bits_come_closer(nano: Sam, items: list[CalibrationItem]) -> None:
    expected = nano.image_encoder(items[0].pixels)

    def error(name: str) -> float:
        quantized: QuantizedSam = quantize_sam(nano, items, scheme(name))
        found = quantized.image_encoder(items[0].pixels)
        return float((found - expected).norm() / expected.norm())

    errors = [error(name) for name in ("minmax44", "minmax66", "w8a8")]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1
