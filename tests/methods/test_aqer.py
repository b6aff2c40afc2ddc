"""Corrections of weights against ridge regression written as one least squares problem."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.methods.aqer import (
    Aqer,
    AqerMethod,
    InputProducts,
    correction,
    error,
    set_correction,
)
from ptq4sam.methods.method import Calibration
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import observe_weights
from ptq4sam.operators.linear import QuantizedLinear
from ptq4sam.quantization.affine import FixedQuantizer
from ptq4sam.quantization.grid import Grid
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]


def layer(bits: int = 4, weight_bits: int = 6) -> tuple[QuantizedLinear, Tensor]:
    """A calibrated layer and inputs whose channels hang together."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    x = torch.randn(3, 400, 12, generator=generator) @ mixing + 0.5
    made = QuantizedLinear(
        nn.Linear(12, 5),
        AdaRoundQuantizer(Grid(weight_bits), channel_axis=0),
        FixedQuantizer(Grid(bits)),
    )
    with torch.no_grad():
        made.weight.copy_(torch.randn(5, 12, generator=generator))
    observe_weights(made)
    with quantizer_mode(made.input_quantizer, Mode.OBSERVE):
        made.input_quantizer(x)
    return made.requires_grad_(False), x


def products_of(made: QuantizedLinear, x: Tensor) -> InputProducts:
    products = InputProducts.of(made)
    for batch in x:
        products.add(made, (batch,))
    return products


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_a_correction_is_the_ridge_regression_of_the_error(ridge: float) -> None:
    made, x = layer()
    # In float64 throughout, so that nothing but the formula can differ.
    made, x = made.double(), x.double()
    found = correction(made.weight, products_of(made, x), ridge)
    rows = x.reshape(-1, 12).numpy()
    moved = made.input_quantizer(x).reshape(-1, 12).numpy()
    weight = made.weight.numpy()
    # Least squares with rows for the ridge beneath, by numpy's decomposition of the whole problem.
    size = ridge * np.mean(np.sum(moved**2, axis=0))
    stacked = np.vstack([moved, np.sqrt(size) * np.eye(12)])
    wanted = np.vstack([(rows - moved) @ weight.T, np.zeros((12, 5))])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_errors_are_those_of_the_sums() -> None:
    made, x = layer()
    products, weight = products_of(made, x), made.weight
    other = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    rows, moved = x.reshape(-1, 12).double(), made.input_quantizer(x).reshape(-1, 12).double()

    def plain(used: Tensor) -> float:
        wanted = rows @ weight.double().t()
        return float((moved @ used.double().t() - wanted).square().sum(1).mean())

    difference = error(other, weight, products) - error(weight, weight, products)
    assert difference == pytest.approx(plain(other) - plain(weight), rel=1e-4)


def correct(made: QuantizedLinear, x: Tensor) -> list[str]:
    model = nn.Sequential(made)
    calibration = Calibration(model, list(x), lambda batch: model(batch))
    return list(AqerMethod(Aqer()).after_ranges(calibration))


def test_a_layer_gives_less_error_and_stays_itself_while_it_is_off() -> None:
    made, x = layer()
    exact = nn.functional.linear(x, made.weight, made.bias)
    before = (made(x) - exact).square().mean()
    weight = made.weight.clone()
    assert correct(made, x) == ["0"]
    assert (made(x) - exact).square().mean() < 0.95 * before
    assert torch.equal(made.weight, weight)
    with quantizer_mode(made, Mode.FLOAT):
        torch.testing.assert_close(made(x), exact)
    # Rounding is learned from the corrected weight.
    quantizer = made.weight_quantizer
    assert isinstance(quantizer, AdaRoundQuantizer)
    moved = quantizer(weight)
    quantizer.begin_learning(weight)
    wanted = quantizer.corrected(weight)
    within = (wanted >= moved.amin(1, True)) & (wanted <= moved.amax(1, True))
    torch.testing.assert_close(quantizer(weight)[within], wanted[within], rtol=0, atol=1e-4)


def test_what_a_method_before_it_added_stays() -> None:
    made, x = layer()
    added = 0.5 * torch.randn(5, 12, generator=torch.Generator().manual_seed(7))
    set_correction(made, added)
    wanted = made.weight + added
    assert correct(made, x) == ["0"]
    found = made.weight_quantizer.corrected(made.weight)
    expected = wanted + correction(wanted, products_of(made, x), Aqer().ridge).float()
    torch.testing.assert_close(found, expected)


def test_a_correction_that_rounding_undoes_is_left_out() -> None:
    """With 2 bits of weights and 8 of inputs there is little to correct and much to lose."""
    made, x = layer(bits=8, weight_bits=2)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    changed = correct(made, x)
    exact = nn.functional.linear(x, made.weight, made.bias)
    after = float((made(x) - exact).square().mean())
    made.load_state_dict(before)
    assert after <= float((made(x) - exact).square().mean())
    assert changed == [] or after < float((made(x) - exact).square().mean())


def test_a_correction_that_fits_few_inputs_alone_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, _ = layer(weight_bits=8)
    few = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    with quantizer_mode(made.input_quantizer, Mode.OBSERVE):
        made.input_quantizer(few)
    model, settings = nn.Sequential(made), Aqer(ridge=1e-9)
    made_of = InputProducts.of(made)
    made_of.add(made, (few[0],))
    weight = made.weight
    corrected = weight + correction(weight, made_of, settings.ridge).float()
    assert error(corrected, weight, made_of) < error(weight, weight, made_of)
    calibration = Calibration(model, list(few), lambda batch: model(batch))
    caplog.clear()
    with caplog.at_level("INFO", logger="ptq4sam.methods.aqer"):
        assert list(AqerMethod(settings).after_ranges(calibration)) == []
    said = [r.message for r in caplog.records if r.name == "ptq4sam.methods.aqer"]
    assert len(said) == 1
    assert said[0].startswith("aqer leaves 0 as it is: its squared error would rise ")


def test_layers_with_other_quantizers_are_left_alone() -> None:
    plain = nn.Sequential(nn.Linear(3, 3))
    calibration = Calibration(plain, [], lambda item: None)
    assert list(AqerMethod(Aqer()).after_ranges(calibration)) == []


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_is_corrected_and_frozen(
    steps: int,
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheme = make_scheme(4, steps, methods=["aqer"])
    with caplog.at_level("INFO", logger="ptq4sam.model.calibration"):
        quantized = quantize_sam(sam, items, scheme)
    assert "mask_decoder.transformer.layers.0.self_attn.q_proj" in quantized.applied["aqer"]
    assert any(r.message.startswith("aqer changed ") for r in caplog.records)
    assert audit(quantized, lambda: forward(quantized)).findings == ()
    held = [n for n, v in quantized.state_dict().items() if n.endswith(".correction") and v.numel()]
    assert held == []
    without = quantize_sam(sam, items, scheme.with_overrides("methods=[]"))
    assert not torch.equal(forward(quantized)[1], forward(without)[1])
