"""COCO-format data sets (Lin et al., 2014): a folder of pictures and an instances file."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq4sam.data.annotations import TEXT_NUMBERS, ImageEntry, InstancesFile
from ptq4sam.data.file_names import PictureFinder
from ptq4sam.data.images import ImageRecord, ImageSet, check_limit, read_size, require_folder
from ptq4sam.data.objects import FLAT, UNUSABLE, AnnotatedObjects, UnusableObject
from ptq4sam.data.segmentation import decode_segmentation
from ptq4sam.errors import DataError
from ptq4sam.files import read_json

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object.

    Attributes:
        annotation_id: its id in the file.
        box: xyxy in pixels, float32 [4], as annotated.
        category_id: its category.
        iscrowd: a region of many objects, not one: never a prompt, ignored in AP.
        area: pixels, as annotated.
        segmentation: polygons or a run-length encoding; None where only a box is annotated.
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
        """The mask, bool [height, width], drawn at each call.

        Raises:
            DataError: only a box is annotated.
        """
        if self.segmentation is None:
            raise DataError(f"annotation id {self.annotation_id} has a box and no mask: add one")
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
        masks: whether every object needs a mask, as for scores; without, as for calibration, a box
            is enough.
        enough: if so many of the first annotated pictures are there, the rest may be missing; it is
            not used then. None: every picture has to be there.

    Attributes:
        federated: what a file of LVIS says beyond COCO's; None of others, and where no object needs
            a mask.

    Raises:
        DataError: a file is missing or damaged or not in COCO format, or an LVIS file lacks what
            scores need; a picture is missing or an annotation unusable and not to be skipped.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        skip_bad: bool = False,
        limit: int | None = None,
        masks: bool = True,
        enough: int | None = None,
    ) -> None:
        super().__init__(skip_bad)
        images, annotations = Path(images), Path(annotations)
        check_limit(limit)
        require_folder(images)
        self.path = annotations
        content, self._digest = read_json(annotations, "annotations file")
        file = InstancesFile(content, annotations)
        self.category_names = file.categories()
        entries = file.images()
        written = file.annotations()
        self.federated = file.federated() if masks and written else None
        finder = PictureFinder(images, [entry.file_name for entry in entries])
        needed = entries if enough is None else _needed(entries, written, enough, finder)
        self.images = self._present(needed, finder, limit)
        objects = AnnotatedObjects(annotations, self.category_names, masks)
        self._annotations = self._usable(written, {e.id for e in entries}, objects)
        if file.text_number is not None:
            _log.info(TEXT_NUMBERS, annotations, file.text_number)
        objects.tell()

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
                segmentation=annotation.get("segmentation"),
                size=size,
            )
            for annotation in self._annotations[record.id]
        ]

    def require_masks(self) -> None:
        """Refuse objects that have a box alone.

        Raises:
            DataError: there is one.
        """
        for record in self.images:
            for annotation in self._annotations[record.id]:
                if "segmentation" not in annotation:
                    raise DataError(
                        self._told(annotation, "scores need its mask, it has a box alone", record)
                    )

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

    def _present(
        self, entries: Sequence[ImageEntry], finder: PictureFinder, limit: int | None
    ) -> list[ImageRecord]:
        """The first `limit` pictures whose files are there."""
        present: list[ImageRecord] = []
        missing: list[ImageEntry] = []
        damaged: list[str] = []
        unsized = 0
        for entry in entries:
            if len(present) == limit:
                break
            path = finder.find(entry.file_name)
            if path is None:
                missing.append(entry)
                continue
            width, height = entry.width, entry.height
            if width is None or height is None:
                unsized += 1
                try:
                    width, height = read_size(path)
                except DataError as error:
                    damaged.append(f"image id {entry.id}: {error}")
                    continue
            present.append(ImageRecord(entry.id, path, width, height))
        self._skip("missing image", _absent(missing, finder))
        self._skip("damaged image", damaged)
        if not present:
            found = (
                f"none of its {len(entries)} images is there" if entries else "it lists no image"
            )
            raise DataError(f"{self.path}: {found}")
        twice = len(present) - len({record.path for record in present})
        if twice:
            _log.warning(
                "%s: %d of %d pictures are there before, under another id: each counts",
                self.path,
                twice,
                len(present),
            )
        if finder.renamed:
            name, path = next(iter(finder.renamed.items()))
            _log.info(
                "%s: %d of %d file names are not quite those of the files; the first, %s, is %s",
                self.path,
                len(finder.renamed),
                len(present),
                name,
                path,
            )
        if unsized:
            _log.info(
                "%s: width and height of %d pictures are missing: read from the pictures",
                self.path,
                unsized,
            )
        return present

    def _usable(
        self,
        annotations: Sequence[dict[str, Any]],
        known: set[int],
        objects: AnnotatedObjects,
    ) -> defaultdict[int, list[dict[str, Any]]]:
        """Usable annotations of the used pictures, by image id."""
        used = {record.id: record for record in self.images}
        usable: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        problems: defaultdict[str, list[str]] = defaultdict(list)
        for annotation in annotations:
            record = used.get(annotation["image_id"])
            if record is None:
                if annotation["image_id"] not in known:
                    problems[UNUSABLE].append(self._told(annotation, "no such image"))
                continue
            try:
                usable[record.id].append(objects.complete(annotation, record))
            except UnusableObject as error:
                problems[error.kind].append(self._told(annotation, str(error), record))
        flat = problems.pop(FLAT, [])
        if flat:
            self.skipped[FLAT] += len(flat)
            _log.info("skipped %d x %s, first: %s", len(flat), FLAT, flat[0])
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


def _needed(
    entries: Sequence[ImageEntry],
    annotations: Sequence[dict[str, Any]],
    enough: int,
    finder: PictureFinder,
) -> Sequence[ImageEntry]:
    """The first `enough` annotated entries, if they are there and some other is not; else all."""
    annotated = {annotation["image_id"] for annotation in annotations}
    first = [entry for entry in entries if entry.id in annotated][:enough]
    if not first or any(finder.find(entry.file_name) is None for entry in first):
        return entries
    if all(finder.find(entry.file_name) is not None for entry in entries):
        return entries
    _log.info("%s: of its pictures the first %d annotated are used", finder.folder, len(first))
    return first


def _absent(missing: Sequence[ImageEntry], finder: PictureFinder) -> list[str]:
    told = [
        f"image id {entry.id}: there is no image file {finder.folder / entry.file_name}"
        for entry in missing
    ]
    if told:
        told[0] += finder.advice(missing[0].file_name)
    return told


def coco_index(dataset: CocoDataset, annotations: list[dict[str, Any]]) -> COCO:
    """A pycocotools index of a data set's pictures with the given annotations, without its prints.

    Args:
        dataset: pictures and categories, with what LVIS says of them.
        annotations: in COCO's format, of these pictures; they are numbered anew from 1, for
            COCOeval takes an object with id 0 for none.
    """
    from pycocotools.coco import COCO

    index: Any = COCO()
    federated = dataset.federated
    index.dataset = {
        "info": {},
        "images": [
            {"id": r.id, "file_name": r.path.name, "width": r.width, "height": r.height}
            | ({} if federated is None else federated.of_image(r.id))
            for r in dataset.images
        ],
        "annotations": [{**item, "id": n} for n, item in enumerate(annotations, start=1)],
        "categories": [
            {"id": k, "name": v}
            | ({} if federated is None else {"frequency": federated.frequencies[k]})
            for k, v in dataset.category_names.items()
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    indexed: COCO = index
    return indexed


def _xyxy(box: Sequence[float]) -> NDArray[np.float32]:
    x, y, width, height = box
    return np.array([x, y, x + width, y + height], dtype=np.float32)
