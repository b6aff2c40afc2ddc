"""Pictures and their annotations: COCO-format data sets, image folders, generated scenes."""

from ptq4sam.data.coco import CocoDataset, Instance
from ptq4sam.data.folders import ImageFolder
from ptq4sam.data.images import ImageRecord, ImageSet, read_image

__all__ = [
    "CocoDataset",
    "ImageFolder",
    "ImageRecord",
    "ImageSet",
    "Instance",
    "read_image",
]
