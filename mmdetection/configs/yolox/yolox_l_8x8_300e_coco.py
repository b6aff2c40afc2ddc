_base_ = "mmdet::yolox/yolox_l_8xb8-300e_coco.py"
