from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import dropping, quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import FixedQuantizer, LSQQuantizer, Mode, Quantizer


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_quantizer = FixedQuantizer(Grid(4))
        self.input_quantizer = LSQQuantizer(Grid(4))


@pytest.fixture
def model() -> nn.Module:
    model = nn.ModuleDict({"first": Layer(), "second": Layer()})
    for index, (_, quantizer) in enumerate(quantizers(model)):
        quantizer.mode = list(Mode)[index % 3]
    return model


def modes(model: nn.Module) -> list[Mode]:
    return [quantizer.mode for _, quantizer in quantizers(model)]


def test_quantizers_are_found_with_their_paths(model: nn.Module) -> None:
    assert [name for name, _ in quantizers(model)] == [
        "first.weight_quantizer",
        "first.input_quantizer",
        "second.weight_quantizer",
        "second.input_quantizer",
    ]
    alone = FixedQuantizer(Grid(4))
    assert list(quantizers(alone)) == [("", alone)]


def test_modes_are_put_back(model: nn.Module) -> None:
    before = modes(model)
    assert len(set(before)) == 3
    with quantizer_mode(model, Mode.OBSERVE):
        assert set(modes(model)) == {Mode.OBSERVE}
        with quantizer_mode(model["first"], Mode.FLOAT):
            assert modes(model) == [Mode.FLOAT, Mode.FLOAT, Mode.OBSERVE, Mode.OBSERVE]
        assert set(modes(model)) == {Mode.OBSERVE}
    assert modes(model) == before


def test_modes_are_put_back_after_an_exception(model: nn.Module) -> None:
    before = modes(model)
    with pytest.raises(KeyError, match="boom"), quantizer_mode(model, Mode.FLOAT):
        raise KeyError("boom")
    assert modes(model) == before


def test_only_the_selected(model: nn.Module) -> None:
    before = modes(model)

    def learned(quantizer: Quantizer) -> bool:
        return isinstance(quantizer, LSQQuantizer)

    with quantizer_mode(model, Mode.OBSERVE, select=learned):
        assert modes(model)[1::2] == [Mode.OBSERVE] * 2
        assert modes(model)[::2] == before[::2]
    assert modes(model) == before


def test_an_exception_in_select_changes_nothing(model: nn.Module) -> None:
    before = modes(model)

    def fail(quantizer: Quantizer) -> bool:
        if quantizer is model["second"].weight_quantizer:
            raise ValueError("no")
        return True

    with pytest.raises(ValueError, match="no"), quantizer_mode(model, Mode.FLOAT, select=fail):
        pass
    assert modes(model) == before


def test_weights_are_never_dropped(model: nn.Module) -> None:
    generator = torch.Generator()
    own = torch.Generator()
    model["second"].input_quantizer.drop_probability = 0.1
    model["second"].input_quantizer.generator = own

    def state() -> list[tuple[float, torch.Generator | None]]:
        return [(q.drop_probability, q.generator) for _, q in quantizers(model)]

    before = state()
    with dropping(model, 0.5, generator):
        assert state() == [(0.0, None), (0.5, generator), (0.0, None), (0.5, generator)]
    assert state() == before
    with pytest.raises(RuntimeError, match="diverged"), dropping(model, 0.5, generator):
        raise RuntimeError("diverged")
    assert state() == before


def test_dropping_a_single_layer_spares_its_weight() -> None:
    layer = Layer()
    with dropping(layer, 0.5, None):
        assert layer.weight_quantizer.drop_probability == 0
        assert layer.input_quantizer.drop_probability == 0.5
