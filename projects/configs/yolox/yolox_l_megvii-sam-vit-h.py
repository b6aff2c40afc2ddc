_base_ = ["../_base_/coco.py", "../_base_/sam_vit_h.py", "../_base_/yolox_l_megvii.py"]
