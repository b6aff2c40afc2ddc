_base_ = "mmdet::yolox/yolox_x_8xb8-300e_coco.py"
