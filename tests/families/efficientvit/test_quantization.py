"""EfficientViT SAMs are quantized as any other: units, audit, more bits nearer, files, int64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptq4sam
from ptq4sam.deploy.cost import count
from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.verify import verify_operators
from ptq4sam.families import VARIANTS
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import STATE, quantized_operators
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from tests.families.efficientvit.conftest import TINY_VARIANT
from tests.tiny_runs import SCHEMES


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny_efficientvit", TINY_VARIANT)


def scheme(name: str, *more: str) -> Scheme:
    read = Scheme.from_yaml(SCHEMES / f"{name}.yaml")
    quick = ["w_qconfig.observer=MinMaxObserver", *more]
    return read.with_overrides(*quick, *(["recon.iters=2"] if read.recon is not None else []))


def forward(sam: Sam, item: CalibrationItem) -> tuple[Tensor, ...]:
    features = sam.embed(item.pixels)
    return (*features, *sam.decode(features, None, item.boxes, None, True))


def quantized(sam: Sam, items: list[CalibrationItem], name: str, *more: str) -> QuantizedSam:
    with torch.enable_grad():
        return quantize_sam(sam, items, scheme(name, *more))


@pytest.mark.parametrize("name", ["ptq4sam-s44", "ptq4sam-l44", "w8a8"])
def test_a_quantized_model_passes_the_audit(
    tiny: Sam, items: list[CalibrationItem], name: str
) -> None:
    found = quantized(tiny, items, name)
    report = audit(found, lambda: forward(found, items[0]))
    assert report.passed, "\n".join(report.lines())
    names = [unit for unit, _ in model_units(found)]
    assert len(names) == len(set(names))
    # Stem and residual block; two each of three stages; halving, attention and MBConv; the neck's
    # joins, block and output; the norm; the decoder's 9.
    assert len(names) == 2 + 2 * 3 + 3 + (3 + 1 + 1) + 1 + 9
    assert report.encoder == "quantized"


def test_int64_gives_the_same_bits(tiny: Sam, items: list[CalibrationItem]) -> None:
    found = quantized(tiny, items, "w8a8")
    integer = integer_model(found)
    for ours, expected in zip(forward(integer, items[0]), forward(found, items[0]), strict=True):
        assert ours.equal(expected)
    checks = verify_operators(found, integer, lambda: forward(found, items[0]))
    assert all(check.kept for check in checks)
    cores = [check.name for check in checks if check.name.endswith("context_module.main.core")]
    assert len(cores) == 1


def test_states_have_the_bits_of_both_operands(tiny: Sam, items: list[CalibrationItem]) -> None:
    def bits(*more: str) -> set[int]:
        slots = [o.slots() for _, o in quantized_operators(quantized(tiny, items, *more))]
        return {own[STATE].grid.bits for own in slots if STATE in own}

    assert bits("w8a8") == {16}
    assert bits("minmax44") == {8}
    assert bits("w8a8", "slots={state: {bit: 8}}") == {8}


def test_more_bits_come_closer(tiny: Sam, items: list[CalibrationItem]) -> None:
    expected = tiny.image_encoder(items[0].pixels)

    def error(name: str) -> float:
        given = quantized(tiny, items, name).image_encoder(items[0].pixels)
        return float((given - expected).norm() / expected.norm())

    errors = [error(name) for name in ("minmax44", "minmax66", "w8a8")]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_a_file_gives_it_back(tiny: Sam, items: list[CalibrationItem], tmp_path: Path) -> None:
    found = quantized(tiny, items, "ptq4sam-s44")
    ptq4sam.save(found, tmp_path / "tiny.safetensors")
    again = ptq4sam.load(tmp_path / "tiny.safetensors")
    for ours, expected in zip(forward(again, items[0]), forward(found, items[0]), strict=True):
        assert ours.equal(expected)


def test_cost_knows_bits_and_groups() -> None:
    cost = {part.name: part for part in count("tiny_efficientvit", scheme("w8a8")).parts}
    attention = cost["encoder attention"]
    # 16 channels a head, 4 heads of two scales, 2 x 2 places.
    places, heads, dim = 4, 4, 16
    products = heads * places * dim * dim, heads * places * dim * (dim + 1)
    assert attention.macs == sum(products)
    assert attention.bit_operations == 64 * products[0] + 8 * 16 * products[1]
    # Of two halving blocks and two others: channels, and places behind them.
    filtered = 128 * 4**2 + 32 * 4**2 + 128 * 2**2 + 64 * 2**2
    assert cost["encoder MBConv, depthwise"].macs == 9 * filtered
