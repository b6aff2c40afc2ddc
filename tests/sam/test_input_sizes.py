"""SAMs that were fine-tuned for pictures of another size, or normalised otherwise."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import CheckpointError
from ptq4sam.families import build_sam
from ptq4sam.families.checkpoint import image_size_of, load_sam
from ptq4sam.families.sam_vit.sizes import SIZES, SamVariant
from ptq4sam.sam.geometry import SAM_NORMALIZATION
from ptq4sam.sam.predictor import Predictor

TOLERANCE = 1e-4  # of the largest magnitude
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def nano_state(random_state: Callable[..., State]) -> State:
    return random_state(build_sam("vit_nano").state_dict())


@pytest.mark.parametrize("side", [128, 200, 512])
@pytest.mark.parametrize("tables", ["resized", "kept"])
def test_a_sam_of_another_size_is_segment_anythings_of_that_size(
    side: int,
    tables: str,
    reference_sam: Callable[[SamVariant], nn.Module],
    random_state: Callable[..., State],
    error_of: Callable[[Tensor, Tensor], float],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("segment_anything")
    from segment_anything import SamPredictor

    own = SIZES["vit_nano"]
    reference: Any = reference_sam(replace(own, image_size=side))
    state = random_state(reference.state_dict())
    if tables == "kept":
        # Fine-tuned at another size with the relative positions of the model's own.
        whole = random_state(reference_sam(own).state_dict())
        for key in state:
            if "rel_pos" in key:
                state[key] = whole[key]
                reference.get_submodule(key.rpartition(".")[0]).register_parameter(
                    key.rpartition(".")[2], nn.Parameter(whole[key])
                )
    reference.load_state_dict(state)
    torch.save({"model": state}, tmp_path / "tuned.pth")
    with caplog.at_level(logging.INFO, "ptq4sam"):
        sam = load_sam("vit_nano", tmp_path / "tuned.pth")
    assert f"for pictures of {side} pixels, not 256" in caplog.text
    assert sam.image_size == image_size_of("vit_nano", tmp_path / "tuned.pth") == side

    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    ours, theirs = Predictor(sam), SamPredictor(reference)
    ours.set_image(image)
    theirs.set_image(image)
    assert error_of(ours.embedding.features, theirs.get_image_embedding()) < TOLERANCE
    box = np.array([20.0, 10, 90, 50])
    earlier = np.random.default_rng(1).normal(0, 5, (1, *sam.mask_input_size)).astype(np.float32)
    assert sam.mask_input_size == (side // 2, side // 2)
    for mask in (None, earlier):
        found = ours.predict(
            boxes=box[None], masks=None if mask is None else mask[None], multimask=True
        )
        _, _, expected = theirs.predict(box=box, mask_input=mask)
        assert error_of(found.low_res[0], torch.as_tensor(expected)) < TOLERANCE
        logits, _, _ = theirs.predict(box=box, mask_input=mask, return_logits=True)
        full = ours.full_resolution(found.low_res)[0]
        assert error_of(full, torch.as_tensor(logits)) < TOLERANCE


def test_a_directory_of_another_size_loads(
    sam_model: Callable[[SamVariant], Any], tmp_path: Path
) -> None:
    theirs = sam_model(replace(SIZES["vit_nano"], image_size=128))
    theirs.save_pretrained(tmp_path)
    sam = load_sam("vit_nano", tmp_path)
    assert sam.image_size == 128
    weight = theirs.state_dict()["vision_encoder.layers.3.attn.rel_pos_h"]
    assert sam.state_dict()["image_encoder.blocks.3.attn.rel_pos_h"].equal(weight)


@pytest.mark.parametrize(
    ("key", "shape", "told"),
    [
        ("image_encoder.pos_embed", (1, 16, 32, 160), "(1, n, n, 160), but found (1, 16, 32, 160)"),
        ("image_encoder.pos_embed", (1, 1025, 160), "but found (1, 1025, 160)"),
        ("image_encoder.blocks.3.attn.rel_pos_h", (31, 32), "(63, 32), but found (31, 32)"),
        ("image_encoder.blocks.0.attn.rel_pos_h", (63, 32), "(15, 32), but found (63, 32)"),
        ("image_encoder.patch_embed.proj.weight", (160, 3, 16, 16), "but found (160, 3, 16, 16)"),
    ],
)
def test_shapes_that_make_no_sam_are_refused(
    nano_state: State, tmp_path: Path, key: str, shape: tuple[int, ...], told: str
) -> None:
    torch.save({**nano_state, key: torch.ones(shape)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load_sam("vit_nano", tmp_path / "a.pth")
    assert told in str(caught.value)


def normalized(state: State, tmp_path: Path, mean: Any, std: Any) -> Path:
    constants = {"pixel_mean": mean, "pixel_std": std}
    given = {
        f"sam.{name}": torch.tensor(values).view(-1, 1, 1)
        for name, values in constants.items()
        if values is not None
    }
    weights = {f"sam.{key}": tensor for key, tensor in state.items()}
    torch.save(weights | given, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ([123.675, 116.28, 103.53], None),
        (None, [58.4, 57.1, 57.4]),
        ([0.485, 0.456, 0.406], None),
    ],
)
def test_sams_own_normalization_is_no_news(
    nano_state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture, mean: Any, std: Any
) -> None:
    sam = load_sam("vit_nano", normalized(nano_state, tmp_path, mean, std))
    assert sam.normalization == SAM_NORMALIZATION
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_another_normalization_is_used_and_said(
    nano_state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mean, std in (([127.5] * 3, [51.0] * 3), ([0.5] * 3, [0.2] * 3)):
        caplog.clear()
        sam = load_sam("vit_nano", normalized(nano_state, tmp_path, mean, std))
        assert "normalised by its mean (127.5, 127.5, 127.5) and deviation (51," in caplog.text
        assert caplog.records[-1].levelno == logging.WARNING
        pixels = torch.full((1, 3, 256, 256), 178.5)
        assert sam.preprocess(pixels).allclose(torch.ones(1))


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        ([0.0] * 3, [1.0] * 3, "does not say how"),
        ([100.0], [50.0], "three finite values"),
        ([100.0] * 3, [0.0] * 3, "three finite values"),
        ([float("nan")] * 3, [1.0] * 3, "three finite values"),
    ],
)
def test_a_normalization_that_says_nothing_is_refused(
    nano_state: State, tmp_path: Path, mean: Any, std: Any, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        load_sam("vit_nano", normalized(nano_state, tmp_path, mean, std))


@pytest.mark.parametrize("place", ["beside", "settings"])
def test_a_normalization_is_found_wherever_it_is(
    nano_state: State, tmp_path: Path, place: str
) -> None:
    said: dict[str, object] = {"pixel_mean": [127.5] * 3, "pixel_std": (127.5,) * 3}
    path = tmp_path / "a.pth"
    torch.save({"model": nano_state, **(said if place == "beside" else {"config": said})}, path)
    assert load_sam("vit_nano", path).normalization.std == (127.5,) * 3
    torch.save({"model": nano_state, "pixel_mean": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="its pixel_mean cannot be read"):
        load_sam("vit_nano", path)


def test_the_image_processor_of_a_directory_is_read(
    sam_model: Callable[[SamVariant], Any], tmp_path: Path
) -> None:
    sam_model(SIZES["vit_nano"]).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.485, 0.456, 0.406], "rescale_factor": 1 / 255}))
    assert load_sam("vit_nano", tmp_path).normalization == SAM_NORMALIZATION
    path.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    found = load_sam("vit_nano", tmp_path).normalization
    assert found.mean == pytest.approx([127.5] * 3)
    path.write_text(json.dumps({"do_normalize": False}))
    found = load_sam("vit_nano", tmp_path).normalization
    assert (found.mean, found.std) == (pytest.approx([0] * 3), pytest.approx([255] * 3))
    path.write_text(json.dumps({"image_mean": "half"}))
    with pytest.raises(CheckpointError, match="not what SamImageProcessor writes"):
        load_sam("vit_nano", tmp_path)
