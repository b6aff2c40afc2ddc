"""Write what README.md shows: docs/first-look.png, and the table of results.

    python tools/write_readme.py               # both; the picture takes some two minutes
    python tools/write_readme.py --table-only  # after docs/results.md was measured anew

The table is taken from docs/results.md, which tools/write_results.py measures.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import ptq4sam
from ptq4sam.data.scenes import Scene, generate_scene, write_scenes
from ptq4sam.evaluation import mask_ious
from ptq4sam.evaluation.pictures import draw_segments
from ptq4sam.files import save_picture, write_text
from ptq4sam.sam.model import Sam
from ptq4sam.sam.predictor import Predictor

_ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = _ROOT / "README.md", _ROOT / "docs" / "results.md"
PICTURE = _ROOT / "docs" / "first-look.png"

_BEGIN, _END = "<!-- results: tools/write_readme.py -->", "<!-- end of results -->"
_SEEDS = (1_000_003, 1_000_012)
"""Of the scenes that are drawn, which no other command generates."""
_SCALE, _BAR, _GAP = 0.9, 26, 6
_MODELS = {"float": None, "W6A6": "ptq4sam-s66", "W4A4": "ptq4sam-s44"}


def readme_table(results: str) -> list[str]:
    """README's table, from the first part of docs/results.md: a row a method, each data set."""
    results = re.split(r"^## ", results, flags=re.MULTILINE)[1]
    sections = re.findall(r"^### (.+)\n\n(\d+) pictures.*\n\n((?:\|.*\n)+)", results, re.MULTILINE)
    rows: dict[str, list[str]] = {}
    heads = ["method"]
    for name, pictures, table in sections:
        title, _, *lines = (_cells(line) for line in table.splitlines())
        heads += [f"{pictures} {name}: mean IoU", "AP"]
        for line in lines:
            found = dict(zip(title, line, strict=True))
            rows.setdefault(found["method"], [found["method"]]).extend(
                [found["mean IoU"], found["AP"]]
            )
    rule = "|---|" + "---:|" * (len(heads) - 1)
    return [_line(heads), rule, *map(_line, rows.values())]


def with_table(readme: str, results: str) -> str:
    """README with the table of these results."""
    start, end = readme.index(_BEGIN) + len(_BEGIN), readme.index(_END)
    table = "\n".join(readme_table(results))
    return f"{readme[:start]}\n\n{table}\n\n{readme[end:]}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(models: dict[str, Sam]) -> Image.Image:
    """A row for each scene: the picture with each model's masks of the true boxes."""
    columns: list[list[Image.Image]] = []
    titles: list[str] = []
    for name, sam in models.items():
        ious: list[float] = []
        column = []
        for seed in _SEEDS:
            scene = generate_scene(seed)
            masks = _masks(sam, scene)
            ious += mask_ious(masks, np.stack([one.mask for one in scene.instances])).tolist()
            drawn = draw_segments(scene.image, masks)
            size = (round(drawn.width * _SCALE), round(drawn.height * _SCALE))
            column.append(drawn.resize(size, Image.Resampling.LANCZOS))
        columns.append(column)
        titles.append(f"{name}: mean IoU {np.mean(ious):.2f}")
    wide, high = columns[0][0].size
    size = (len(columns) * (wide + _GAP) - _GAP, _BAR + len(_SEEDS) * (high + _GAP) - _GAP)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for x, (column, title) in enumerate(zip(columns, titles, strict=True)):
        left = x * (wide + _GAP)
        pen.text((left + wide / 2, _BAR / 2), title, fill="black", font=font, anchor="mm")
        for y, picture in enumerate(column):
            canvas.paste(picture, (left, _BAR + y * (high + _GAP)))
    return canvas.quantize(128)


def _masks(sam: Sam, scene: Scene) -> NDArray[np.bool_]:
    """Masks [objects, height, width] of the true boxes."""
    predictor = Predictor(sam)
    embedding = predictor.embed(scene.image)
    boxes = np.stack([one.box for one in scene.instances])
    low_res = predictor.predict(boxes=boxes, embedding=embedding).low_res
    found: NDArray[np.bool_] = predictor.binary_masks(low_res, embedding)[:, 0].cpu().numpy()
    return found


def models() -> dict[str, Sam]:
    """vit_nano, and vit_nano quantized by PTQ4SAM-S on 32 other scenes."""
    sam = ptq4sam.load_sam("vit_nano")
    with tempfile.TemporaryDirectory() as folder:
        train = ptq4sam.CocoDataset(*write_scenes(Path(folder), 32, 0, "train"))
        return {
            name: sam if scheme is None else ptq4sam.quantize(sam, train, scheme)
            for name, scheme in _MODELS.items()
        }


def main() -> None:
    """Write both, or the table alone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    write_text(with_table(readme, RESULTS.read_text(encoding="utf-8")), README)
    if not arguments.table_only:
        save_picture(draw(models()), PICTURE, optimize=True)


if __name__ == "__main__":
    main()
