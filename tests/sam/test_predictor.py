"""Resizing, coordinates and decoding in pieces, against segment-anything's own predictor."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.errors import DataError
from ptq4sam.families import build_sam
from ptq4sam.families.sam_vit.sizes import SIZES, SamVariant
from ptq4sam.sam.geometry import Geometry
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor, resized_picture
from ptq4sam.skeletons import shapes_alone

HEIGHT, WIDTH = 150, 203


@pytest.fixture(scope="module")
def sam(random_state: Callable[..., dict[str, Tensor]]) -> Sam:
    model = build_sam("vit_nano")
    model.load_state_dict(random_state(model.state_dict()))
    return model


@pytest.fixture(scope="module")
def image() -> Any:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor(sam: Sam, image: Any) -> Predictor:
    # Room for three prompts at once: 6 tensors of 128 channels in 32x32 cells each.
    result = Predictor(sam, memory_budget=3 * 6 * 128 * 32 * 32 * 4 + 1)
    assert result.prompts_at_once == 3
    result.set_image(image)
    return result


@pytest.mark.parametrize(("kind", "prompts"), [("cpu", 16), ("cuda", 85), ("xpu", 16)])
def test_as_many_prompts_at_once_as_the_device_has_room_for(kind: str, prompts: int) -> None:
    base = SimpleNamespace(device=torch.device(kind), embedding_bytes=256 * 64 * 64 * 4)
    assert Predictor(base).prompts_at_once == prompts  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def official(sam: Sam, image: Any, reference_sam: Callable[[SamVariant], nn.Module]) -> Any:
    from segment_anything import SamPredictor

    reference = reference_sam(SIZES["vit_nano"])
    reference.load_state_dict(sam.state_dict())
    result = SamPredictor(reference)
    result.set_image(image)
    return result


def random_boxes(count: int) -> Any:
    corners = np.random.default_rng(3).uniform(0, [WIDTH, HEIGHT], (count, 2, 2))
    return np.sort(corners, axis=1).reshape(count, 4)


@pytest.mark.parametrize(
    "size", [(150, 203), (480, 640), (640, 427), (256, 256), (31, 17), (9, 500)]
)
@pytest.mark.parametrize("side", [256, 1024])
def test_pictures_are_resized_as_by_the_official_code(size: tuple[int, int], side: int) -> None:
    transforms = pytest.importorskip("segment_anything.utils.transforms")
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = transforms.ResizeLongestSide(side).apply_image(picture)
    geometry = Geometry(side, side, ())
    resized = resized_picture(picture, geometry)
    assert resized.shape[:2] == geometry.placed(size)
    assert np.array_equal(resized, expected)


def test_a_thin_picture_keeps_one_pixel() -> None:
    thin = np.zeros((2000, 1, 3), dtype=np.uint8)
    assert resized_picture(thin, Geometry(256, 256, ())).shape == (256, 1, 3)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", ["box", "points", "box, points and mask"])
def test_masks_equal_the_official_predictor(
    predictor: Predictor, official: Any, kind: str, multimask: bool, error_of: Any
) -> None:
    box, points = random_boxes(1)[0], np.array([[20.5, 100.0], [150.0, 3.0]])
    labels = np.array([1, 0])
    mask = np.random.default_rng(4).normal(0, 5, (1, 128, 128))
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if "box" in kind:
        ours["boxes"], theirs["box"] = box[None], box
    if "points" in kind:
        ours |= {"points": points[None], "labels": labels[None]}
        theirs |= {"point_coords": points, "point_labels": labels}
    if "mask" in kind:
        ours["masks"], theirs["mask_input"] = mask[None], mask
    prediction = predictor.predict(**ours, multimask=multimask)
    logits, ious, low_res = official.predict(
        **theirs, multimask_output=multimask, return_logits=True
    )
    assert error_of(prediction.low_res[0], torch.from_numpy(low_res)) < 1e-4
    torch.testing.assert_close(
        prediction.iou_predictions[0], torch.from_numpy(ious), rtol=1e-4, atol=1e-5
    )
    full = predictor.full_resolution(prediction.low_res)
    assert full.shape == (1, 3 if multimask else 1, HEIGHT, WIDTH)
    assert error_of(full[0], torch.from_numpy(logits)) < 1e-4


def test_prompts_in_pieces_equal_each_alone(predictor: Predictor) -> None:
    boxes = random_boxes(8)
    together = predictor.predict(boxes=boxes, multimask=True)
    assert together.low_res.shape == (8, 3, 128, 128)
    for index in range(8):
        alone = predictor.predict(boxes=boxes[index : index + 1], multimask=True)
        torch.testing.assert_close(together.low_res[index], alone.low_res[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together.iou_predictions[index], alone.iou_predictions[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("multimask", [False, True])
def test_300_boxes_within_a_memory_budget_equal_those_at_once(
    predictor: Predictor, multimask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    attend = type(predictor.sam.mask_decoder).attend

    def counting(self: Any, *inputs: Tensor) -> Any:
        seen.append(inputs[3].shape[0])
        return attend(self, *inputs)

    monkeypatch.setattr(type(predictor.sam.mask_decoder), "attend", counting)
    boxes = random_boxes(300)
    embedding = predictor.embedding
    budgets = {2**40: [300], 200 * 2**20: [66] * 4 + [36], 1: [1] * 300}
    results = []
    for budget, pieces in budgets.items():
        seen.clear()
        chunked = Predictor(predictor.sam, budget)
        results.append(chunked.predict(boxes=boxes, multimask=multimask, embedding=embedding))
        assert seen == pieces
    whole, *others = results
    assert whole.low_res.shape == (300, 3 if multimask else 1, 128, 128)
    for other in others:
        scale = whole.low_res.abs().max()
        assert (other.low_res - whole.low_res).abs().max() <= 1e-5 * scale
        assert (other.iou_predictions - whole.iou_predictions).abs().max() <= 1e-5


def test_the_budget_of_sams_own_decoder_is_16_prompts(predictor: Predictor) -> None:
    assert Predictor(predictor.sam).prompts_at_once == 128
    with shapes_alone():
        assert Predictor(build_sam("vit_b")).prompts_at_once == 16
    with pytest.raises(ValueError, match="positive"):
        Predictor(predictor.sam, 0)


def test_full_resolution_in_pieces_equals_the_whole(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    low_res = predictor.predict(boxes=random_boxes(5), multimask=True).low_res
    embedding = predictor.embedding
    whole = predictor.sam.postprocess_masks(low_res, embedding.input_size, embedding.original_size)
    # Four masks at once out of fifteen: the last piece is uneven.
    monkeypatch.setattr("ptq4sam.sam.predictor._RESIZE_BYTES", 4 * 4 * (256 * 256 + HEIGHT * WIDTH))
    full = predictor.full_resolution(low_res)
    torch.testing.assert_close(full, whole, rtol=1e-5, atol=1e-5)
    masks = predictor.binary_masks(low_res)
    assert masks.equal(full > 0)
    assert masks.any()
    assert not masks.all()


def test_no_prompts_give_empty_predictions(predictor: Predictor) -> None:
    prediction = predictor.predict(boxes=np.zeros((0, 4)), multimask=True)
    assert prediction.low_res.shape == (0, 3, 128, 128)
    assert prediction.iou_predictions.shape == (0, 3)
    assert predictor.full_resolution(prediction.low_res).shape == (0, 3, HEIGHT, WIDTH)


def test_an_embedding_outlives_the_next_picture(predictor: Predictor, image: Any) -> None:
    boxes = random_boxes(2)
    expected = predictor.predict(boxes=boxes)
    other = Predictor(predictor.sam)
    embedding = other.embed(image)
    other.set_image(image[::-1, :100].copy())
    assert other.embedding.original_size == (HEIGHT, 100)
    found = other.predict(boxes=boxes, embedding=embedding)
    torch.testing.assert_close(found.low_res, expected.low_res, rtol=1e-4, atol=1e-5)
    assert other.full_resolution(found.low_res, embedding).shape[2:] == (HEIGHT, WIDTH)


def test_replaced_modules_are_used(sam: Sam, image: Any) -> None:
    class Wrapper(nn.Module):
        """Has the call signature of what it wraps, and nothing else."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, *inputs: Tensor) -> Any:
            self.calls += 1
            return self.inner(*inputs)

    encoder, transformer = sam.image_encoder, sam.mask_decoder.transformer
    wrappers: Any = Wrapper(encoder), Wrapper(transformer)
    boxes = random_boxes(2)
    plain = Predictor(sam)
    plain.set_image(image)
    expected = plain.predict(boxes=boxes)
    try:
        sam.image_encoder, sam.mask_decoder.transformer = wrappers
        replaced = Predictor(sam)
        replaced.set_image(image)
        found = replaced.predict(boxes=boxes)
    finally:
        sam.image_encoder, sam.mask_decoder.transformer = encoder, transformer
    assert [wrapper.calls for wrapper in wrappers] == [1, 1]
    assert found.low_res.equal(expected.low_res)


def test_results_can_be_trained_on(predictor: Predictor) -> None:
    features = predictor.embedding.features
    assert not features.requires_grad
    assert not features.is_inference()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no prompt"),
        ({"points": [[[1, 2]]]}, "together"),
        ({"boxes": [1, 2, 3, 4]}, r"\[N, 4\].*\[4\]"),
        ({"boxes": [[1, 2, 3, float("nan")]]}, "finite"),
        ({"points": [[[1, 2]]], "labels": [[2]]}, "found \\[2"),
        ({"points": [[[1, 2]]], "labels": [[1, 0]]}, r"labels.*\[1, 2\]"),
        ({"points": [[[1, 2]]], "labels": [[1]], "boxes": [[1, 2, 3, 4]] * 2}, "equally many"),
        ({"masks": np.zeros((1, 1, 64, 64))}, "128"),
    ],
)
def test_bad_prompts_are_told_in_one_line(
    predictor: Predictor, prompts: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        predictor.predict(**prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((5, 5), dtype=np.uint8),
        np.zeros((5, 5, 4), dtype=np.uint8),
        np.zeros((5, 5, 3), dtype=np.float32),
        np.zeros((0, 5, 3), dtype=np.uint8),
    ],
)
def test_bad_pictures_are_told(predictor: Predictor, picture: Any) -> None:
    with pytest.raises(DataError, match="uint8"):
        predictor.embed(picture)


def test_a_picture_is_needed_first(sam: Sam) -> None:
    with pytest.raises(DataError, match="set_image"):
        Predictor(sam).predict(boxes=random_boxes(1))
