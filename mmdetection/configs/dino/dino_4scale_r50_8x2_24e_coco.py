_base_ = "mmdet::dino/dino-4scale_r50_8xb2-24e_coco.py"
