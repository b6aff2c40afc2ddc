"""Pictures and their annotations: COCO-format data sets, image folders, generated scenes."""

from ptq4sam.data.coco import CocoDataset, Instance, open_images
from ptq4sam.data.images import ImageFolder, ImageRecord, ImageSet, read_image

__all__ = [
    "CocoDataset",
    "ImageFolder",
    "ImageRecord",
    "ImageSet",
    "Instance",
    "open_images",
    "read_image",
]
