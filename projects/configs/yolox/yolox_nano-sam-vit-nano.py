"""The smallest pair on photographs: YOLOX-Nano in ONNX (416 px) and vit_nano, on coco_mini."""

_base_ = ["../_base_/coco_mini.py", "../_base_/sam_vit_nano.py"]

detector = dict(type="onnx", checkpoint="ckpt/yolox_nano.onnx")
prompting = dict(score_threshold=0.01, max_per_image=100, use_sam_iou=True)
