_base_ = "mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py"
