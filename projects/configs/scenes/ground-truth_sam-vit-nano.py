"""vit_nano with the scenes' own boxes: mean IoU without a detector's mistakes."""

_base_ = "./scene-detector_sam-vit-nano.py"

detector = dict(type="ground-truth")
prompting = dict(use_sam_iou=False)
