"""How good masks are: mask and box AP, mean IoU, agreement of two models; pictures of them."""

from ptq4sam.data.segmentation import encode_masks
from ptq4sam.evaluation.overlap import best_ious, mask_ious, mean_iou_by_size
from ptq4sam.evaluation.scores import BoxScores, MaskScores, mask_results
from ptq4sam.files import write_json

__all__ = [
    "BoxScores",
    "MaskScores",
    "best_ious",
    "encode_masks",
    "mask_ious",
    "mask_results",
    "mean_iou_by_size",
    "write_json",
]
