"""How pictures come in, and of what size is what an encoder makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Normalization(NamedTuple):
    """What pictures are normalised by, by channel (red, green, blue), of values 0 to 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


SAM_NORMALIZATION = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""SAM's own."""


@dataclass(frozen=True)
class Geometry:
    """Pictures on their way in, and what the encoder makes of them.

    Attributes:
        encoder_side: of the encoder's square input, in pixels.
        prompt_side: of the square that prompts and masks are placed in, in pixels.
        features: channels, rows and columns of each tensor that the encoder hands over; the first
            is the image embedding.
        normalization: of pixels.
        resizing: by the longest side, or both sides to the square. Then pixels are normalised, and
            zeros fill the square at the right and bottom.
    """

    encoder_side: int
    prompt_side: int
    features: tuple[tuple[int, int, int], ...]
    normalization: Normalization = SAM_NORMALIZATION
    resizing: Literal["longest side", "square"] = "longest side"

    def resized(self, original_size: tuple[int, int], side: int) -> tuple[int, int]:
        """Size (height, width) of a picture within a square of `side` pixels."""
        if self.resizing == "square":
            return side, side
        scale = side * 1.0 / max(original_size)
        # The official code would make a side of nothing out of a very thin picture.
        height, width = (max(1, int(length * scale + 0.5)) for length in original_size)
        return height, width

    def placed(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """Size (height, width) of a picture within the prompts' square."""
        return self.resized(original_size, self.prompt_side)
