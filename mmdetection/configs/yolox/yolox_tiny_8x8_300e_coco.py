_base_ = "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py"
