_base_ = "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py"
# As published: surer boxes than mmdetection keeps (0.01), in any number.
model = {"test_cfg": {"score_thr": 0.05, "max_per_img": -1}}
