"""COCO-format data sets (Lin et al., 2014): a folder of pictures and an instances file."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.images import ImageFolder, ImageRecord, ImageSet, check_limit
from ptq4sam.data.segmentation import (
    are_numbers,
    decode_segmentation,
    encode_segmentation,
    segmentation_problem,
)
from ptq4sam.downloads import where_from
from ptq4sam.errors import DataError
from ptq4sam.files import read_json

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_NO_SEGMENTATION = "annotation without segmentation"
_UNUSABLE = "unusable annotation"


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object.

    Attributes:
        annotation_id: its id in the file.
        box: xyxy in pixels, float32 [4], as annotated.
        category_id: its category.
        iscrowd: a region of many objects, not one: never a prompt, ignored in AP.
        area: pixels, as annotated.
        segmentation: polygons or a run-length encoding.
        size: (height, width) of the picture.
    """

    annotation_id: int
    box: NDArray[np.float32]
    category_id: int
    iscrowd: bool
    area: float
    segmentation: Any
    size: tuple[int, int]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask, bool [height, width], drawn at each call."""
        return decode_segmentation(self.segmentation, *self.size)


class CocoDataset(ImageSet):
    """A COCO-format data set.

    Where a picture has an EXIF orientation, the annotations' width and height say whether it is
    turned: see `read_image`.

    Args:
        images: folder that the annotations' file names are relative to.
        annotations: instances file; one without annotations (a test set's) has no ground truth.
        skip_bad: skip missing and damaged pictures and unusable annotations.
        limit: use the first pictures only.

    Raises:
        DataError: a file is missing or damaged or not in COCO format; a picture is missing or an
            annotation unusable and not to be skipped.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        skip_bad: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__(skip_bad)
        images, annotations = Path(images), Path(annotations)
        check_limit(limit)
        if not images.is_dir():
            raise DataError(f"there is no image folder {images}: {where_from(images)}")
        self.path = annotations
        content, self._digest = read_json(annotations, "annotations file")
        if not isinstance(content, dict):
            raise DataError(f"{annotations} is not in COCO format: it is not an object")
        self.category_names = _categories(content, annotations)
        every = _image_records(content, images, annotations)
        self.images = self._present(every, limit)
        self._annotations = self._usable(content, every)

    def fingerprint(self) -> str:
        """Identifies the instances file by its bytes (which name every picture)."""
        return self._digest

    def annotated_images(self) -> list[ImageRecord]:
        """The pictures that have annotations, in file order."""
        return [record for record in self.images if self._annotations[record.id]]

    def instances(self, record: ImageRecord) -> list[Instance]:
        """The annotated objects of a picture, crowd regions included, in file order."""
        size = (record.height, record.width)
        return [
            Instance(
                annotation_id=annotation["id"],
                box=_xyxy(annotation["bbox"]),
                category_id=annotation["category_id"],
                iscrowd=bool(annotation["iscrowd"]),
                area=float(annotation["area"]),
                segmentation=annotation["segmentation"],
                size=size,
            )
            for annotation in self._annotations[record.id]
        ]

    def subset(self, records: Sequence[ImageRecord]) -> CocoDataset:
        """The same data set with some of its pictures only."""
        part = copy.copy(self)
        part.images = list(records)
        part.__dict__.pop("ground_truth", None)
        return part

    @cached_property
    def ground_truth(self) -> COCO:
        """The pictures and usable annotations as pycocotools' index."""
        annotations = [item for record in self.images for item in self._annotations[record.id]]
        return coco_index(self, annotations)

    def _present(self, records: list[ImageRecord], limit: int | None) -> list[ImageRecord]:
        """The first `limit` pictures whose files are there."""
        listings: dict[Path, set[str]] = {}
        present: list[ImageRecord] = []
        missing: list[str] = []
        for record in records:
            if len(present) == limit:
                break
            # One listing instead of a hundred thousand look-ups, which network disks are slow at.
            folder = record.path.parent
            if folder not in listings:
                listings[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
            if record.path.name in listings[folder] or record.path.is_file():
                present.append(record)
            else:
                missing.append(f"image id {record.id}: there is no image file {record.path}")
        self._skip("missing image", missing)
        if not present:
            found = (
                f"none of its {len(records)} images is there" if records else "it lists no image"
            )
            raise DataError(f"{self.path}: {found}")
        return present

    def _usable(
        self, content: Mapping[str, Any], every: Sequence[ImageRecord]
    ) -> defaultdict[int, list[dict[str, Any]]]:
        """Usable annotations of the used pictures, by image id."""
        known = {record.id for record in every}
        used = {record.id: record for record in self.images}
        usable: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        problems: dict[str, list[str]] = {_NO_SEGMENTATION: [], _UNUSABLE: []}
        for annotation in _annotation_entries(content, self.path):
            record = used.get(annotation["image_id"])
            if record is None:
                if annotation["image_id"] not in known:
                    problems[_UNUSABLE].append(self._told(annotation, "no such image"))
                continue
            try:
                usable[record.id].append(self._complete(annotation, record))
            except _Unusable as error:
                problems[error.kind].append(self._told(annotation, str(error), record))
        for kind, texts in problems.items():
            self._skip(kind, texts)
        return usable

    def _told(
        self, annotation: Mapping[str, Any], problem: str, record: ImageRecord | None = None
    ) -> str:
        where = f"image id {annotation['image_id']}"
        if record is not None:
            where += f" ({record.path.name})"
        return f"{self.path}: annotation id {annotation['id']} of {where}: {problem}"

    def _complete(self, annotation: Mapping[str, Any], record: ImageRecord) -> dict[str, Any]:
        """The annotation with what COCO lets one derive: crowd flag, area and box."""
        category = annotation.get("category_id")
        if not isinstance(category, int) or category not in self.category_names:
            raise _Unusable(_UNUSABLE, f"no category {category!r}")
        segmentation = annotation.get("segmentation")
        problem = segmentation_problem(segmentation, record.height, record.width)
        if problem is not None:
            raise _Unusable(_UNUSABLE if segmentation else _NO_SEGMENTATION, problem)
        complete = {"iscrowd": 0, **annotation}
        if not {"area", "bbox"} <= complete.keys():
            from pycocotools import mask as coco_mask

            encoded = encode_segmentation(segmentation, record.height, record.width)
            complete.setdefault("area", float(coco_mask.area(encoded)))
            complete.setdefault("bbox", [float(side) for side in coco_mask.toBbox(encoded)])
        if complete["iscrowd"] not in (0, 1):
            raise _Unusable(_UNUSABLE, f"iscrowd is {complete['iscrowd']!r}, not 0 or 1")
        if not are_numbers([complete["area"]]):
            raise _Unusable(_UNUSABLE, f"area is {complete['area']!r}, not a number")
        box = complete["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and are_numbers(box)):
            raise _Unusable(_UNUSABLE, f"bbox is {box!r}, not [x, y, width, height]")
        return complete


class _Unusable(Exception):
    """An annotation cannot be used."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def open_images(
    images: Path, annotations: Path | None, *, skip_bad: bool = False, limit: int | None = None
) -> ImageSet:
    """A data set in COCO's format, or a plain folder where there are no annotations.

    Arguments and errors are those of `CocoDataset` and `ImageFolder`.
    """
    if annotations is None:
        return ImageFolder(images, skip_bad=skip_bad, limit=limit)
    return CocoDataset(images, annotations, skip_bad=skip_bad, limit=limit)


def coco_index(dataset: ImageSet, annotations: list[dict[str, Any]]) -> COCO:
    """A pycocotools index of a data set's pictures with the given annotations, without its prints.

    Args:
        dataset: pictures and categories.
        annotations: in COCO's format, of these pictures; they are numbered anew from 1, for
            COCOeval takes an object with id 0 for none.
    """
    from pycocotools.coco import COCO

    index: Any = COCO()
    index.dataset = {
        "info": {},
        "images": [
            {"id": r.id, "file_name": r.path.name, "width": r.width, "height": r.height}
            for r in dataset.images
        ],
        "annotations": [{**item, "id": n} for n, item in enumerate(annotations, start=1)],
        "categories": [{"id": k, "name": v} for k, v in dataset.category_names.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    indexed: COCO = index
    return indexed


def _image_records(content: Mapping[str, Any], images: Path, path: Path) -> list[ImageRecord]:
    records: dict[int, ImageRecord] = {}
    for number, entry in enumerate(_list(content, "images", path)):
        _check_fields(
            entry,
            {"id": int, "file_name": str, "width": int, "height": int},
            path,
            f"images[{number}]",
        )
        if entry["id"] in records:
            raise DataError(f"{path} is not in COCO format: image id {entry['id']} is there twice")
        if entry["width"] < 1 or entry["height"] < 1:
            raise DataError(f"{path}: image id {entry['id']} has no pixels by its width and height")
        records[entry["id"]] = ImageRecord(
            entry["id"], images / entry["file_name"], entry["width"], entry["height"]
        )
    return list(records.values())


def _categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, entry in enumerate(_list(content, "categories", path)):
        _check_fields(entry, {"id": int, "name": str}, path, f"categories[{number}]")
        if entry["id"] in names:
            raise DataError(
                f"{path} is not in COCO format: category id {entry['id']} is there twice"
            )
        names[entry["id"]] = entry["name"]
    return names


def _annotation_entries(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    entries = _list(content, "annotations", path) if "annotations" in content else []
    seen: set[int] = set()
    for number, entry in enumerate(entries):
        _check_fields(entry, {"id": int, "image_id": int}, path, f"annotations[{number}]")
        if entry["id"] in seen:
            raise DataError(
                f"{path} is not in COCO format: annotation id {entry['id']} is there twice"
            )
        seen.add(entry["id"])
    return entries


def _list(content: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        raise DataError(f'{path} is not in COCO format: there is no list "{key}" in it')
    return value


def _check_fields(entry: Any, kinds: Mapping[str, type], path: Path, where: str) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"{path} is not in COCO format: {where} is not an object")
    for key, kind in kinds.items():
        value = entry.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise DataError(
                f"{path} is not in COCO format: {where}.{key} is {value!r}, {kind.__name__} needed"
            )


def _xyxy(box: Sequence[float]) -> NDArray[np.float32]:
    x, y, width, height = box
    return np.array([x, y, x + width, y + height], dtype=np.float32)
