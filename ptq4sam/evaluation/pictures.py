"""Pictures of masks, boxes and scores, for eyes."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ptq4sam.files import save_picture

Colour = tuple[int, int, int]

_OPACITY = 0.45
_GOLDEN_RATIO = 0.618034
_BLACK, _WHITE, _GREY = (0, 0, 0), (255, 255, 255), (40, 40, 40)


def draw_masks(
    image: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: Sequence[str],
    score_threshold: float = 0.0,
) -> Image.Image:
    """Draws masks with their boxes, labels and scores over a picture, the best on top.

    A mask's colour follows from its place, so that pictures of two models can be compared.

    Args:
        image: RGB uint8 [height, width, 3].
        masks: bool [n, height, width].
        boxes: xyxy in pixels [n, 4].
        scores: [n].
        labels: [n] names of the categories.
        score_threshold: masks with a lower score are not drawn.
    """
    order = [i for i in np.argsort(scores, kind="stable") if scores[i] >= score_threshold]
    pixels = image.astype(np.float32)
    for i in order:
        colour = np.array(colour_of(int(i)), np.float32)
        pixels[masks[i]] += _OPACITY * (colour - pixels[masks[i]])
        pixels[_outline(masks[i])] = colour
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    font = _font(picture)
    for i in order:
        draw.rectangle(_inside(boxes[i], picture), outline=colour_of(int(i)), width=_line(picture))
    # Labels come last, or boxes would cross them out.
    taken: list[tuple[float, float, float, float]] = []
    for i in reversed(order):
        text = f"{labels[i]} {scores[i]:.2f}"
        _draw_label(draw, text, boxes[i], colour_of(int(i)), font, taken)
    return picture


def draw_segments(image: NDArray[np.uint8], masks: Iterable[NDArray[np.bool_]]) -> Image.Image:
    """Draws masks without names over a picture, each over the ones before it.

    Args:
        image: RGB uint8 [height, width, 3].
        masks: bool [height, width] each; large ones first, or they hide small ones.
    """
    pixels = image.astype(np.float32)
    for number, mask in enumerate(masks):
        colour = np.array(colour_of(number), np.float32)
        # Of the picture itself: colours of masks over each other would mix to grey.
        pixels[mask] = image[mask] + _OPACITY * (colour - image[mask])
        pixels[_outline(mask)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def side_by_side(
    left: Image.Image, right: Image.Image, titles: tuple[str, str] = ("float", "quantized")
) -> Image.Image:
    """Two pictures next to each other, each under its title."""
    font = _font(left)
    bar, gap = int(font.size * 1.8), max(2, left.width // 160)
    size = (left.width + gap + right.width, bar + max(left.height, right.height))
    canvas = Image.new("RGB", size, _GREY)
    draw = ImageDraw.Draw(canvas)
    for picture, title, x in zip((left, right), titles, (0, left.width + gap), strict=True):
        canvas.paste(picture, (x, bar))
        middle = (x + picture.width / 2, bar / 2)
        draw.text(middle, title, fill=_WHITE, font=font, anchor="mm")
    return canvas


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, at once or not at all, in the format of its suffix (.jpg, .png)."""
    save_picture(picture, path, quality=90)


def colour_of(number: int) -> Colour:
    """A bright colour; neighbouring numbers have colours far apart."""
    hue = (0.02 + number * _GOLDEN_RATIO) % 1
    lightness = (0.55, 0.7, 0.42)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever stands out more: by WCAG 2's contrast ratio, at least 4.5."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3294 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _BLACK if luminance > 0.179 else _WHITE


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask [height, width] that have a neighbour outside of it."""
    inner = np.pad(mask, 1)
    inner = inner[1:-1, :-2] & inner[1:-1, 2:] & inner[:-2, 1:-1] & inner[2:, 1:-1]
    return mask & ~inner


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: NDArray[np.float32],
    colour: Colour,
    font: ImageFont.FreeTypeFont,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write on a field of the colour at the box's corner, below what is written there already.

    Where no place is left, the label is: one over another could not be read.
    """
    canvas_width, canvas_height = draw.im.size
    _, _, width, height = draw.textbbox((0, 0), text, font=font, anchor="lt")
    width, height = width + 6, height + 6
    left = max(0.0, min(float(box[0]), canvas_width - width))
    top = float(box[1]) - height
    top = top if top >= 0 else max(0.0, float(box[1]))
    field = (left, top, left + width, top + height)
    while any(_overlap(field, other) for other in taken):
        field = (left, field[1] + height, left + width, field[3] + height)
        if field[3] > canvas_height:
            return
    taken.append(field)
    draw.rectangle(field, fill=colour)
    middle = ((field[0] + field[2]) / 2, (field[1] + field[3]) / 2)
    draw.text(middle, text, fill=text_colour(colour), font=font, anchor="mm")


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _inside(box: NDArray[np.float32], picture: Image.Image) -> tuple[float, float, float, float]:
    """The box's border pixels, those on the picture's edge included."""
    x0, y0, x1, y1 = (float(side) for side in box)
    return x0, y0, max(x0, min(x1, picture.width) - 1), max(y0, min(y1, picture.height) - 1)


def _line(picture: Image.Image) -> int:
    return max(1, round(min(picture.size) / 250))


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=max(11, min(picture.size) // 36))
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("this Pillow was built without FreeType, which drawing text needs")
    return font
