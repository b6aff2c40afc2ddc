from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq4sam.data import CocoDataset

Content = dict[str, Any]


class Files:
    """A small COCO-format data set on disk: three pictures of 40x30, two objects on the first."""

    def __init__(self, folder: Path) -> None:
        self.images = folder / "images"
        self.annotations = folder / "instances.json"
        self.images.mkdir()
        rng = np.random.default_rng(0)
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(self.images / name)
        self.content: Content = {
            "images": [
                {"id": 10 + i, "file_name": name, "width": 40, "height": 30}
                for i, name in enumerate(("a.jpg", "b.jpg", "c.jpg"))
            ],
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
            "annotations": [
                self.annotation(1, 10, [4, 5, 10, 8]),
                self.annotation(2, 10, [20, 10, 12, 15], category_id=7),
                self.annotation(5, 12, [0, 0, 40, 30]),
            ],
        }

    @staticmethod
    def annotation(number: int, image_id: int, box: list[float], **more: Any) -> Content:
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        made = {
            "id": number,
            "image_id": image_id,
            "category_id": 3,
            "iscrowd": 0,
            "bbox": box,
            "area": w * h,
            "segmentation": [polygon],
        }
        return {**made, **more}

    def write(self, change: Callable[[Content], object] | None = None) -> Files:
        if change is not None:
            change(self.content)
        self.annotations.write_text(json.dumps(self.content))
        return self

    def open(self, **options: Any) -> CocoDataset:
        return CocoDataset(self.images, self.annotations, **options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path).write()
