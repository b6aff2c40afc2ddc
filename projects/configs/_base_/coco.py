"""COCO 2017, unpacked to data/coco: scored on val2017, calibrated on the first of train2017."""

data = dict(
    images="data/coco/val2017",
    annotations="data/coco/annotations/instances_val2017.json",
)
calibration = dict(
    images="data/coco/train2017",
    annotations="data/coco/annotations/instances_train2017.json",
)
