"""YOLOX-L as published: every box that the detector keeps, those above 0.05, goes to SAM."""

detector = dict(
    type="mmdet",
    config="mmdetection/configs/yolox/yolox_l_8x8_300e_coco.py",
    checkpoint="ckpt/yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth",
)
prompting = dict(score_threshold=0.05, max_per_image=None, use_sam_iou=True)
