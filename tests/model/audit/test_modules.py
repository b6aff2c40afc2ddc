"""Modules that compute and are in no list, and encoders that are not what the model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
WINDOW = "image_encoder.blocks.0.attn"
HYPERNETWORK = "mask_decoder.output_hypernetworks_mlps.1"


class Convolved(nn.Module):
    """A hypernetwork's layer with a convolution over its channels behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.convolution = layer, nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [prompts, channels] to the same shape."""
        convolved: Tensor = self.convolution(self.layer(x)[:, None])[:, 0]
        return convolved


def test_a_convolution_within_a_hypernetwork(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    layers = quantized.get_submodule(HYPERNETWORK).layers
    layers[1] = Convolved(layers[1])
    lines = told()
    no_list = "is in no list: neither quantized nor known to be float"
    assert f"{HYPERNETWORK}.layers.1.convolution: {no_list} (Conv1d)" in lines
    assert len(lines) == 2


@pytest.mark.parametrize("network", [HYPERNETWORK, "mask_decoder.iou_prediction_head"])
def test_a_layer_more_within_a_head(
    quantized: QuantizedSam, told: Callable[[], list[str]], network: str
) -> None:
    layers = cast(nn.ModuleList, quantized.get_submodule(network).layers)
    width = layers[1].in_features
    layers.insert(1, nn.Linear(width, width))
    no_list = "is in no list: neither quantized nor known to be float"
    assert told() == [f"{network}.layers.3: {no_list} (Linear)"]


def test_a_module_that_multiplies_without_numbers_of_its_own(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * (x @ x.transpose(-1, -2)).sum()

    upscaling = quantized.mask_decoder.output_upscaling
    upscaling.append(Gram())
    assert told() == [
        "mask_decoder.output_upscaling.5: made 1 products of float numbers, expected 0"
    ]


def test_a_product_more_in_the_decoder(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    decoder = quantized.mask_decoder
    plain = decoder.predict_all

    def predict_all(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        masks, ious = plain(*inputs)
        return masks, F.linear(ious, torch.eye(4))

    decoder.predict_all = predict_all  # type: ignore[method-assign]
    assert told() == ["mask_decoder: made 2 products of float numbers, expected 1"]


def test_a_float_encoder_of_a_model_that_says_it_is_quantized(
    quantized: QuantizedSam, sam: Sam, told: Callable[[], list[str]]
) -> None:
    quantized.image_encoder = sam.image_encoder
    lines = told()
    assert lines[0] == "image_encoder: is float, the model says that its encoder is quantized"
    assert [line.partition(":")[0] for line in lines[1:]] == ["activations"]


def test_a_float_encoder_that_is_hidden(
    quantized: QuantizedSam, sam: Sam, told: Callable[[], list[str]]
) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["encoder"] = sam.image_encoder

        def forward(self, x: Tensor) -> Tensor:
            features: Tensor = self.__dict__["encoder"](x)
            return features

    quantized.image_encoder = Hidden()  # type: ignore[assignment]
    assert "image_encoder: is float, the model says that its encoder is quantized" in told()


def test_a_quantized_encoder_of_a_model_that_says_it_is_float(
    quantized: QuantizedSam, told: Callable[[], list[str]]
) -> None:
    quantized.encoder_quantized = False
    assert told()[0] == "image_encoder: is quantized, the model says that its encoder is float"


def test_a_report_says_what_of_the_encoder_is_quantized(
    sam: Sam,
    items: list[CalibrationItem],
    make_scheme: Callable[..., Scheme],
    forward: Forward,
) -> None:
    def head(units: dict[str, str], quantize_encoder: bool) -> str:
        scheme = make_scheme(4, units=units)
        model = quantize_sam(sam, items[:1], scheme, quantize_encoder=quantize_encoder)
        report = audit(model, lambda: forward(model))
        assert report.passed, report.lines()
        return report.lines()[0]

    assert head({}, True).endswith("image encoder quantized")
    assert head({WINDOW: "float"}, True).endswith("image encoder quantized in part")
    assert head({}, False).endswith("image encoder float")
