"""Shape families of the generated scenes: outlines of one object in its own frame.

A shape is drawn in a unit frame, roughly [-1, 1] on both axes, y pointing down, as filled polygons
(`parts`, painted one over the other) and cut-out polygons (`holes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Outline of an object: polygons of shape (N, 2), x then y, in the unit frame.

    Attributes:
        parts: polygons whose union is the object.
        holes: polygons cut out of that union.
        tilt: largest rotation in radians that keeps the family recognisable.
        aspect: largest ratio of the two axes.
    """

    parts: list[Points]
    holes: list[Points] = field(default_factory=list)
    tilt: float = np.pi
    aspect: float = 1.5


def _polar(radius: Points | float, angle: Points) -> Points:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _at(x: float, y: float) -> Points:
    return np.array([x, y], dtype=np.float64)


def _turn(count: int) -> Points:
    return np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)


def _ellipse(rng: np.random.Generator) -> Shape:
    return Shape([_polar(1.0, _turn(40))], aspect=2.2)


def _box(rng: np.random.Generator) -> Shape:
    corners = np.array([[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]])
    return Shape([corners], aspect=2.4)


def _star(rng: np.random.Generator) -> Shape:
    points = int(rng.integers(5, 8))
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, rng.uniform(0.35, 0.55))
    return Shape([_polar(radius, _turn(2 * points))], aspect=1.3)


def _ring(rng: np.random.Generator) -> Shape:
    outer = _polar(1.0, _turn(40))
    return Shape([outer], holes=[outer * rng.uniform(0.45, 0.68)], aspect=1.6)


def _crescent(rng: np.random.Generator) -> Shape:
    opening = rng.uniform(0.5, 0.85)
    outer = np.linspace(opening, 2.0 * np.pi - opening, 32)
    tip = _polar(1.0, outer[[0]])[0]
    # The inner arc is a circle through both tips whose centre lies between the tips and the rim.
    centre = tip[0] * rng.uniform(0.3, 0.75)
    radius = float(np.hypot(tip[0] - centre, tip[1]))
    start = float(np.arctan2(tip[1], tip[0] - centre))
    inner = np.linspace(2.0 * np.pi - start, start, 28)
    return Shape([np.concatenate([_polar(1.0, outer), _polar(radius, inner) + _at(centre, 0.0)])])


def _cross(rng: np.random.Generator) -> Shape:
    w = rng.uniform(0.2, 0.36)
    bar = np.array([[-1.0, -w], [1.0, -w], [1.0, w], [-1.0, w]])
    return Shape([bar, bar[:, ::-1]], aspect=1.4)


def _blob(rng: np.random.Generator) -> Shape:
    angle = _turn(56)
    orders = np.arange(2, 6)
    weight = rng.uniform(0.3, 1.0, 4) * rng.choice([-1.0, 1.0], 4)
    weight *= rng.uniform(0.4, 0.55) / np.abs(weight).sum()
    phase = rng.uniform(0.0, 2.0 * np.pi, 4)
    radius = 1.0 + (weight * np.cos(angle[:, None] * orders + phase)).sum(axis=1)
    return Shape([_polar(radius / radius.max(), angle)], aspect=1.4)


def _limb(start: Points, end: Points, width: float) -> Points:
    """A straight capsule of half-width `width` between two points."""
    along = end - start
    heading = float(np.arctan2(along[1], along[0]))
    cap = np.linspace(-np.pi / 2.0, np.pi / 2.0, 7) + heading
    return np.concatenate([end + _polar(width, cap), start + _polar(width, cap + np.pi)])


def _figure(rng: np.random.Generator) -> Shape:
    """A standing figure: head, trunk, two arms and two legs, each bent at random."""
    width = rng.uniform(0.09, 0.13)
    neck, hip = _at(0.0, -0.5), _at(0.0, 0.12)
    parts = [
        _polar(rng.uniform(0.19, 0.25), _turn(20)) + _at(rng.uniform(-0.06, 0.06), -0.76),
        _limb(neck + _at(0.0, 0.12), hip, rng.uniform(0.17, 0.25)),
    ]
    for side in (-1.0, 1.0):
        arm, leg = rng.uniform(-0.7, 1.1), rng.uniform(0.1, 0.6)
        shoulder = neck + _at(side * 0.12, 0.06)
        elbow = shoulder + 0.33 * _at(side * np.cos(arm), np.sin(arm))
        fore = arm + rng.uniform(-0.8, 0.8)
        hand = elbow + 0.3 * _at(side * np.cos(fore), np.sin(fore))
        foot = hip + 0.85 * _at(side * np.sin(leg), np.cos(leg))
        parts += [_limb(shoulder, elbow, width), _limb(elbow, hand, width * 0.85)]
        parts.append(_limb(hip + _at(side * 0.09, 0.0), foot, width * 1.15))
    return Shape(parts, tilt=0.5, aspect=1.3)


SHAPES: dict[str, Callable[[np.random.Generator], Shape]] = {
    "ellipse": _ellipse,
    "box": _box,
    "star": _star,
    "ring": _ring,
    "crescent": _crescent,
    "cross": _cross,
    "blob": _blob,
    "figure": _figure,
}
"""Category name -> sampler of a shape of that family; the order is that of the category index."""
