"""YOLOX-L in its authors' own weights, which need no mmdet (the published table used mmdet's).

Boxes above 0.05 go to SAM, as in the published table; this detector gives at most 100.

With the ONNX file instead: --cfg-options detector.type=onnx detector.checkpoint=ckpt/yolox_l.onnx
"""

detector = dict(type="yolox", checkpoint="ckpt/yolox_l.pth")
prompting = dict(score_threshold=0.05, max_per_image=100, use_sam_iou=True)
