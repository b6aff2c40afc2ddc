from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptq4sam.evaluation.pictures import (
    colour_of,
    draw_masks,
    side_by_side,
    text_colour,
    write_picture,
)

GREY = 90


def _example() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    image = np.full((200, 300, 3), GREY, np.uint8)
    masks = np.zeros((3, 200, 300), np.bool_)
    masks[0, 60:120, 40:100] = True
    masks[1, 60:120, 150:220] = True
    masks[2, 140:190, 230:290] = True
    boxes = np.array(
        [[30, 50, 110, 130], [140, 50, 230, 130], [220, 130, 300, 200]], dtype=np.float32
    )
    return image, masks, boxes, np.array([0.9, 0.5, 0.2], np.float32), ["cat", "dog", "bird"]


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_masks_are_tinted_outlined_and_boxed_in_their_colour() -> None:
    image, *rest = _example()
    drawn = _pixels(draw_masks(image, *rest))
    for place, (y, x) in enumerate([(90, 70), (90, 185), (165, 260)]):
        colour = np.array(colour_of(place))
        assert np.allclose(drawn[y, x], GREY + 0.45 * (colour - GREY), atol=1)
    assert tuple(drawn[119, 70]) == colour_of(0)
    assert tuple(drawn[100, 30]) == colour_of(0)
    assert tuple(drawn[199, 250]) == colour_of(2)
    assert (drawn[30:45, 5:25] == GREY).all()
    assert (image == GREY).all()


def test_masks_below_the_threshold_are_not_drawn_and_keep_no_colour_from_others() -> None:
    drawn = _pixels(draw_masks(*_example(), score_threshold=0.3))
    assert (drawn[165, 260] == GREY).all()
    assert (drawn[199, 250] == GREY).all()
    everything = _pixels(draw_masks(*_example()))
    assert np.array_equal(drawn[:125, :210], everything[:125, :210])


def test_the_best_is_on_top() -> None:
    image, masks, boxes, _, labels = _example()
    masks[1] = masks[0]
    for scores, top in (([0.9, 0.5, 0], 0), ([0.5, 0.9, 0], 1)):
        drawn = _pixels(draw_masks(image, masks, boxes, np.array(scores), labels))
        assert tuple(drawn[60, 70]) == colour_of(top)


def _luminance(colour: tuple[int, int, int]) -> float:
    values = np.array(colour) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_labels_stand_out_from_their_field() -> None:
    greys = [(level, level, level) for level in range(0, 256, 5)]
    for background in [colour_of(number) for number in range(60)] + greys:
        dark, light = sorted([_luminance(background), _luminance(text_colour(background))])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("corner", [(30, 50, 110, 130), (0, 0, 60, 60), (270, 170, 300, 200)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_labels_are_wholly_in_the_picture(corner: tuple[int, ...], level: int) -> None:
    """Also where the box is at a border, and whatever the picture's brightness."""
    image = np.full((200, 300, 3), level, np.uint8)

    def label_only(box: tuple[int, ...]) -> int:
        boxes, nothing = np.array([box], np.float32), np.zeros((1, 200, 300), np.bool_)
        with_text = _pixels(draw_masks(image, nothing, boxes, np.ones(1), ["label"]))
        empty = _pixels(draw_masks(image, nothing, boxes, np.ones(1), [""]))
        return int((with_text != empty).any(axis=2).sum())

    assert label_only(corner) > 200
    letters = np.array(text_colour(colour_of(0)))
    boxes, nothing = np.array([corner], np.float32), np.zeros((1, 200, 300), np.bool_)
    drawn = _pixels(draw_masks(image, nothing, boxes, np.ones(1), ["label"]))
    field = np.argwhere((drawn == colour_of(0)).all(axis=2))
    (top, left), (bottom, right) = field.min(axis=0), field.max(axis=0)
    inside = drawn[top : bottom + 1, left : right + 1]
    assert (np.abs(inside - letters).sum(axis=2) < 60).sum() > 10


def test_labels_are_never_one_over_another() -> None:
    image, nothing = np.full((200, 300, 3), GREY, np.uint8), np.zeros((40, 200, 300), np.bool_)
    boxes = np.tile(np.array([[50, 100, 52, 102]], np.float32), (40, 1))
    drawn = _pixels(draw_masks(image, nothing, boxes, np.linspace(1, 0, 40), ["label"] * 40))
    fields = [int((drawn == colour_of(number)).all(axis=2).sum()) for number in range(40)]
    written = [number for number, field in enumerate(fields) if field > 300]
    assert written == list(range(len(written)))
    assert 3 <= len(written) < 10


def test_no_masks_leave_the_picture_as_it_is() -> None:
    image, masks, boxes, scores, _ = _example()
    drawn = draw_masks(image, masks[:0], boxes[:0], scores[:0], [])
    assert np.array_equal(np.asarray(drawn), image)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (40, 30)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    boxes = np.array([[0, 0, size[1], size[0]]], np.float32)
    drawn = draw_masks(image, np.ones((1, *size), np.bool_), boxes, np.ones(1), ["a long label"])
    assert drawn.size == size[::-1]


def test_many_masks_have_colours_that_differ() -> None:
    colours = [np.array(colour_of(number)) for number in range(12)]
    assert min(np.abs(a - b).sum() for a, b in combinations(colours, 2)) > 40
    assert min(np.abs(a - b).sum() for a, b in pairwise(colours)) > 150


def test_two_pictures_stand_side_by_side_under_their_titles() -> None:
    image, *rest = _example()
    left, right = draw_masks(image, *rest), Image.fromarray(image)
    both = side_by_side(left, right, ("float", "W4A4"))
    assert both.width > 600
    assert both.height > 200
    pixels = np.asarray(both)
    bar = both.height - 200
    assert np.array_equal(pixels[bar:, :300], np.asarray(left))
    assert np.array_equal(pixels[bar:, -300:], image)
    for half in (pixels[:bar, :300], pixels[:bar, -300:]):
        assert half.max() > 200


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pictures_are_written_whole(tmp_path: Path, suffix: str) -> None:
    image, *rest = _example()
    drawn = draw_masks(image, *rest)
    path = tmp_path / "shown" / f"a{suffix}"
    write_picture(drawn, path)
    with Image.open(path) as read:
        assert read.size == (300, 200)
        assert read.format == {".jpg": "JPEG", ".png": "PNG"}[suffix]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
