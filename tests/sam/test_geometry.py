"""Encoders and prompts with sides of their own, and encoders that hand over several features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import CalibrationError
from ptq4sam.families import build_sam
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.sam.geometry import Geometry
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
BOX = [[20.0, 10, 90, 50]]


class Halved(nn.Module):
    """vit_nano's encoder for pictures of half its side, with what it saw beside the embedding."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen: list[tuple[int, ...]] = []

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(tuple(pixels.shape))
        doubled = nn.functional.interpolate(pixels, scale_factor=2)
        return self.encoder(doubled), pixels


@pytest.fixture
def halved() -> Sam:
    torch.manual_seed(0)
    sam = build_sam("vit_nano")
    geometry = replace(sam.geometry, encoder_side=128)
    parts = (Halved(sam.image_encoder), sam.prompt_encoder, sam.mask_decoder)
    return Sam("halved", *parts, geometry, sam.description).eval()


def test_pictures_and_prompts_have_sides_of_their_own(
    halved: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[Any, ...]] = []
    plain = halved.mask_decoder.predict_all

    def forward(*given: Any) -> Any:
        decoded.append(given)
        masks, ious = plain(*given[:4])
        return masks[:, :1], ious[:, :1]

    monkeypatch.setattr(halved.mask_decoder, "forward", forward)
    boxes: list[Tensor] = []
    halved.prompt_encoder.register_forward_pre_hook(lambda _module, given: boxes.append(given[1]))
    predictor = Predictor(halved)
    embedding = predictor.embed(PICTURE)
    assert halved.image_encoder.seen == [(1, 3, 128, 128)]
    assert embedding.features.shape == (1, *halved.geometry.features[0])
    assert [tuple(other.shape) for other in embedding.others] == [(1, 3, 128, 128)]
    # Where the prompts' square has the picture, not where the encoder has it.
    assert embedding.input_size == (154, 256)
    found = predictor.predict(boxes=BOX, embedding=embedding)
    torch.testing.assert_close(
        boxes[0], torch.tensor([[20 * 2.56, 10 * 154 / 60, 90 * 2.56, 50 * 154 / 60]])
    )
    # What the encoder hands over beside the embedding reaches the decoder.
    assert torch.equal(decoded[0][-1], embedding.others[0])
    assert predictor.binary_masks(found.low_res, embedding).shape == (1, 1, 60, 100)


def test_pictures_may_be_stretched_to_the_square() -> None:
    geometry = Geometry(512, 1024, (), resizing="square")
    assert geometry.resized((60, 100), 512) == (512, 512)
    assert geometry.placed((60, 100)) == (1024, 1024)
    assert replace(geometry, resizing="longest side").placed((60, 100)) == (614, 1024)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 5)])
def test_a_calibration_picture_without_boxes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"needs boxes of shape \[n, 4\], n at least 1"):
        CalibrationItem(torch.zeros(1, 3, 8, 8), torch.zeros(shape))
