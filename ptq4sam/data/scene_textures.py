"""Colours, surface patterns, backgrounds and camera effects of the generated scenes.

Images are float32 arrays of shape (H, W, 3), RGB in [0, 255], until `photograph` rounds them.
"""

from __future__ import annotations

import colorsys
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Field = NDArray[np.float32]


def random_colour(rng: np.random.Generator) -> Field:
    """Draws an RGB colour of shape (3,), in [0, 255], from dull to saturated, dark to bright."""
    red, green, blue = colorsys.hsv_to_rgb(
        rng.random(), float(rng.beta(1.4, 1.4)), float(rng.uniform(0.12, 1.0))
    )
    return np.array([red, green, blue], dtype=np.float32) * np.float32(255.0)


def contrasting_colour(
    rng: np.random.Generator, surroundings: Field, distance: float, attempts: int = 8
) -> Field:
    """Draws a colour at least `distance` (root mean square over RGB) from `surroundings` (3,).

    Where no draw is far enough the farthest one is returned.
    """
    best, best_distance = surroundings, -1.0
    for _ in range(attempts):
        colour = random_colour(rng)
        found = float(np.sqrt(np.mean((colour - surroundings) ** 2)))
        if found > best_distance:
            best, best_distance = colour, found
        if found >= distance:
            break
    return best


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Field:
    """Smooth random field of shape (height, width) in [0, 1]: a coarse grid, enlarged."""
    coarse = rng.random((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def pattern(rng: np.random.Generator, height: int, width: int) -> Field:
    """Surface pattern of shape (height, width) in [0, 1].

    One of: plain, gradient, soft or hard stripes, checks, spots, smooth noise, grain.
    """
    kind = int(rng.integers(0, 8))
    if kind == 0:
        return np.full((height, width), rng.random(), dtype=np.float32)
    if kind == 6:
        return smooth_noise(rng, height, width, int(rng.integers(3, 9)))
    if kind == 7:
        return rng.random((height, width), dtype=np.float32)
    angle = rng.uniform(0.0, np.pi)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = x * cos + y * sin, y * cos - x * sin
    if kind == 1:
        low, high = float(along.min()), float(along.max())
        return (along - np.float32(low)) / np.float32(max(high - low, 1.0))
    # Periods of a few pixels up to a third of the surface, so that patterns survive a resize.
    frequency = np.float32(2.0 * np.pi / rng.uniform(5.0, max(9.0, max(height, width) / 3.0)))
    wave = np.sin(along * frequency)
    if kind == 2:
        return np.float32(0.5) + np.float32(0.5) * wave + np.zeros_like(across)
    if kind == 3:
        return (wave > np.float32(rng.uniform(-0.4, 0.4))).astype(np.float32)
    other = np.sin(across * frequency)
    if kind == 4:
        return ((wave > 0) ^ (other > 0)).astype(np.float32)
    return (wave * other > np.float32(0.35)).astype(np.float32)


def surface(
    rng: np.random.Generator, height: int, width: int, base: Field, strength: float
) -> Field:
    """Textured, lit surface of shape (height, width, 3) around the colour `base` (3,).

    Args:
        rng: source of randomness.
        height: pixels.
        width: pixels.
        base: RGB in [0, 255].
        strength: 0 = plain colour, 1 = the pattern goes all the way to a second random colour.
    """
    step = (random_colour(rng) - base) * np.float32(strength)
    field = pattern(rng, height, width) - np.float32(0.5)
    light = np.float32(rng.uniform(0.0, 0.45)) * (
        smooth_noise(rng, height, width, 2) - np.float32(0.5)
    )
    return (base + field[..., None] * step) * (np.float32(1.0) + light[..., None])


def background(rng: np.random.Generator, height: int, width: int) -> Field:
    """Background of shape (height, width, 3): colour gradient, pattern, distractor shapes."""
    base = random_colour(rng)
    grid = int(rng.integers(2, 5))
    spread = rng.uniform(10.0, 55.0)
    corners = np.clip(base + rng.normal(0.0, spread, (grid, grid, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    _distract(rng, picture)
    image = np.asarray(picture, dtype=np.float32)
    amplitude = np.float32(rng.uniform(0.0, 45.0))
    field = pattern(rng, height, width) - np.float32(0.5)
    field = field + smooth_noise(rng, height, width, int(rng.integers(8, 40))) - np.float32(0.5)
    return image + (amplitude * field)[..., None]


def _distract(rng: np.random.Generator, picture: Image.Image) -> None:
    """Draws faint patches and thin lines that are nobody's object, in place."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for _ in range(int(rng.integers(0, 5))):
        centre = rng.uniform(0.0, 1.0, 2) * (width, height)
        corners = centre + rng.normal(0.0, 0.35 * height, (3, 2))
        inside = np.clip(centre.astype(int), 0, (width - 1, height - 1))
        here = np.array(picture.getpixel((int(inside[0]), int(inside[1]))), dtype=np.float64)
        colour = np.clip(here + rng.normal(0.0, 14.0, 3), 0, 255).astype(int)
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=tuple(colour.tolist()))
    for _ in range(int(rng.integers(0, 8))):
        ends = rng.uniform(-0.1, 1.1, (2, 2)) * (width, height)
        colour = random_colour(rng).astype(int)
        line = [(float(x), float(y)) for x, y in ends]
        draw.line(line, fill=tuple(colour.tolist()), width=int(rng.integers(1, 3)))


def photograph(rng: np.random.Generator, image: Field) -> NDArray[np.uint8]:
    """Applies a camera to `image` (H, W, 3): lighting, sensor noise, blur, JPEG compression.

    Returns:
        uint8 RGB of shape (H, W, 3).
    """
    height, width = image.shape[:2]
    light = np.float32(rng.uniform(0.0, 0.5)) * smooth_noise(rng, height, width, 3)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= np.float32(rng.uniform(0.0, 9.0))
    noise += image * (np.float32(rng.uniform(0.55, 1.0)) + light)[..., None]
    np.clip(noise, 0.0, 255.0, out=noise)
    picture = Image.fromarray(noise.astype(np.uint8))
    if rng.random() < 0.4:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0))))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=int(rng.integers(35, 95)))
        picture = Image.open(buffer)
    return np.asarray(picture, dtype=np.uint8)
