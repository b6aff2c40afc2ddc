"""Crops and grids, against segment-anything's."""

from __future__ import annotations

import numpy as np
import pytest

from ptq4sam.everything import EverythingSettings
from ptq4sam.everything.crops import Crop, grid_of, make_crops, point_grid


@pytest.mark.parametrize("size", [(150, 203), (480, 640), (999, 31)])
@pytest.mark.parametrize("overlap", [0.0, 512 / 1500, 0.6])
def test_crops_are_those_of_the_official_code(size: tuple[int, int], overlap: float) -> None:
    amg = pytest.importorskip("segment_anything.utils.amg")
    settings = EverythingSettings(crop_n_layers=3, crop_overlap_ratio=overlap)
    boxes, layers = amg.generate_crop_boxes(size, 3, overlap)
    crops = make_crops(size, settings)
    assert [list(crop.box) for crop in crops] == [list(box) for box in boxes]
    assert [crop.layer for crop in crops] == layers


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_grids_are_those_of_the_official_code(factor: int) -> None:
    amg = pytest.importorskip("segment_anything.utils.amg")
    settings = EverythingSettings(crop_n_layers=2, crop_n_points_downscale_factor=factor)
    grids = amg.build_all_layer_point_grids(32, 2, factor)
    for layer, grid in enumerate(grids):
        assert np.array_equal(point_grid(settings.points_in_layer(layer)), grid)


def test_crops_cover_the_picture() -> None:
    covered = np.zeros((61, 97), int)
    for crop in make_crops((61, 97), EverythingSettings(crop_n_layers=2)):
        left, top, right, bottom = crop.box
        covered[top:bottom, left:right] += 10**crop.layer
    assert (covered % 10 == 1).all()
    assert (covered // 10 % 10 >= 1).all()
    assert (covered // 100 >= 1).all()


def test_points_are_the_centres_of_cells() -> None:
    points = grid_of(Crop((10, 20, 50, 100), 0), EverythingSettings(points_per_side=2))
    assert points.tolist() == [[10, 20], [30, 20], [10, 60], [30, 60]]


def test_crops_without_a_pixel_are_left_out() -> None:
    crops = make_crops((3, 3), EverythingSettings(crop_n_layers=3, crop_overlap_ratio=0))
    assert all(min(crop.size) > 0 for crop in crops)
    assert {crop.layer for crop in crops} == {0, 1, 2, 3}
