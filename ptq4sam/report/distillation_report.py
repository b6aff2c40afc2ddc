"""The report of a distillation: its curves and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ptq4sam.distillation.training import CURVES
from ptq4sam.errors import DataError
from ptq4sam.files import read_json
from ptq4sam.report.figures import FLOAT, QUANTIZED, axes, legend, svg
from ptq4sam.report.page import Banner, Page, Plot, Plots, Section, Text, Tile

_OF_MASKS = (("mean IoU", "student", QUANTIZED), ("teacher's mean IoU", "teacher", FLOAT))
"""Curves that are drawn together: name, legend and colour."""

Curve = Sequence[tuple[float, float]]


def distillation_page(folder: Path) -> Page:
    """What there is of a distillation, as a page.

    Raises:
        DataError: its file of curves is damaged.
        DependencyError: matplotlib is not installed.
    """
    path = folder / CURVES
    content, _ = read_json(path, "curves of a distillation")
    needed = ("student", "teacher", "settings", "steps", "done", "curves")
    if not isinstance(content, Mapping) or any(key not in content for key in needed):
        raise DataError(f"{path} is damaged: it lacks one of {', '.join(needed)}")
    curves: Mapping[str, Curve] = content["curves"]
    teacher = content["teacher"] or "the truth alone"
    banners = []
    if content["done"] < content["steps"]:
        banners.append(
            Banner(
                f"This training has made {content['done']} of {content['steps']} steps. Resume it "
                "to go on."
            )
        )
    return Page(
        f"{content['student']} learns from {teacher}",
        f"Report of {folder}",
        [
            Section("curves", "Curves", [Plots("Terms of the loss", _plots(curves))], _INTRO),
            Section("settings", "Settings", [Text(_settings(content["settings"]), "as used")]),
        ],
        _tiles(content, curves),
        banners,
    )


_INTRO = (
    "Means over equal numbers of steps, before the terms' weights. IoUs are those of training "
    "views with their prompts, the best of three for a lone click: they tell whether it learns, "
    "not how good the model is, which ptq4sam evaluate does."
)


def _settings(settings: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(settings), sort_keys=False)
    return text


def _tiles(content: Mapping[str, Any], curves: Mapping[str, Curve]) -> list[Tile]:
    tiles = [Tile("steps", f"{content['done']:,}", f"of {content['steps']:,}")]
    last = {name: points[-1][1] for name, points in curves.items() if points}
    if "mean IoU" in last:
        known = last.get("teacher's mean IoU")
        note = "on training views" if known is None else f"on training views; teacher {known:.3f}"
        tiles.append(Tile("mean IoU at the end", f"{last['mean IoU']:.3f}", note))
    return tiles


def _plots(curves: Mapping[str, Curve]) -> list[Plot]:
    together = [name for name, _, _ in _OF_MASKS]
    plots = []
    if "mean IoU" in curves:
        figure, (one,) = axes("step", "mean IoU")
        for name, label, colour in _OF_MASKS:
            if name in curves:
                one.plot(*_line(curves[name]), color=colour, linewidth=1.4, label=label)
        legend(one, "lower right")
        plots.append(Plot(svg(figure, "Mean IoU of training views by step"), "", "mean IoU"))
    for name, points in curves.items():
        if name not in together:
            figure, (one,) = axes("step", name)
            one.plot(*_line(points), color=QUANTIZED, linewidth=1.4)
            drawn = svg(figure, f"The term {name} by step")
            plots.append(Plot(drawn, f"{points[-1][1]:.4g} at the end", name))
    return plots


def _line(points: Curve) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
