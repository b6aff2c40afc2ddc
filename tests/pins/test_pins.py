"""Results may not move unseen; `python tools/write_pins.py` records them anew where they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptq4sam.deploy.export import Format, export
from ptq4sam.deploy.exported import open_exported
from ptq4sam.deploy.reference import integer_model
from ptq4sam.deploy.storage import load, save
from ptq4sam.model.insertion import QuantizedSam
from tests.pins.pins import CASES, here, outputs, quantized, record, recorded

RUNTIMES: dict[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino"}


@pytest.fixture
def sam(case: str) -> QuantizedSam:
    """The model that was compared with the record, or where it is none of here a quick one."""
    return quantized(case, quick=here() != recorded()["here"])


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_that_were_recorded(case: str, tmp_path: Path) -> None:
    content = recorded()
    if (found := here()) != content["here"]:
        differing = {name: value for name, value in found.items() if value != content["here"][name]}
        pytest.skip(f"recorded elsewhere, float sums may differ: {differing}")
    assert record(case, tmp_path) == content["cases"][case]


@pytest.mark.parametrize("case", CASES)
def test_integers_and_a_file_give_the_same_bits(sam: QuantizedSam, tmp_path: Path) -> None:
    """Holds on every processor, with the simulation of the same run as the reference."""
    save(sam, tmp_path / "packed.safetensors")
    expected = outputs(sam)
    for other in (integer_model(sam), load(tmp_path / "packed.safetensors")):
        for name, value in outputs(other).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", ["W8A8", "W4A4 PTQ4SAM-S"])
def test_exported_graphs_give_the_values_of_the_simulation(
    sam: QuantizedSam, runtime: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    export(sam, tmp_path, RUNTIMES[runtime])
    expected = outputs(sam)
    found = outputs(open_exported(tmp_path, runtime))
    assert torch.equal(found["embedding"], expected["embedding"])
    # The same codes: only last bits of the float layers behind them differ.
    for name in ("masks", "ious"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_the_record_is_complete() -> None:
    content = recorded()
    assert list(content["cases"]) == list(CASES)
    digests = [value for case in content["cases"].values() for value in case.values()]
    # Masks and scales of different bits cannot be the same: a record of nothing would be.
    assert len(set(digests)) > 5 * len(CASES)
