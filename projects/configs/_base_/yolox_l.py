"""YOLOX-L; the detector keeps boxes above 0.01, at most 100 go to SAM."""

detector = dict(
    type="mmdet",
    config="mmdetection/configs/yolox/yolox_l_8x8_300e_coco.py",
    checkpoint="ckpt/yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth",
)
prompting = dict(score_threshold=0.01, max_per_image=100, use_sam_iou=True)
