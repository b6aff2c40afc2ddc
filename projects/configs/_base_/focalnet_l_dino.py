"""DINO with a FocalNet-L; its best 300 boxes go to SAM, and COCO's AP counts the best 100 masks."""

detector = dict(
    type="focalnet_dino",
    checkpoint="ckpt/focalnet_large_fl4_o365_finetuned_on_coco.pth",
)
prompting = dict(max_per_image=300, use_sam_iou=True)
