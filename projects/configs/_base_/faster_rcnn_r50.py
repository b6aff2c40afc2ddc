"""Faster R-CNN R50-FPN; the detector keeps boxes above 0.05, at most 100 go to SAM."""

detector = dict(
    type="mmdet",
    config="mmdetection/configs/faster_rcnn/faster_rcnn_r50_fpn_2x_coco.py",
    checkpoint="ckpt/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
)
prompting = dict(score_threshold=0.05, max_per_image=100, use_sam_iou=True)
