_base_ = "mmdet::yolox/yolox_m_8xb8-300e_coco.py"
