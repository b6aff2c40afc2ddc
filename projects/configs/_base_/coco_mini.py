"""A small part of COCO 2017 in data/coco_mini."""

data = dict(
    images="data/coco_mini/images/val2017",
    annotations="data/coco_mini/annotations/instances_val.json",
)
calibration = dict(
    images="data/coco_mini/images/train2017",
    annotations="data/coco_mini/annotations/instances_train.json",
)
