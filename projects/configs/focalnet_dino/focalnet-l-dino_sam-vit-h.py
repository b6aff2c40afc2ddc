_base_ = ["../_base_/coco.py", "../_base_/sam_vit_h.py", "../_base_/focalnet_l_dino.py"]
