"""DINO with a FocalNet-L; every box goes to SAM, and COCO's AP counts the best 100 masks."""

detector = dict(
    type="focalnet_dino",
    checkpoint="ckpt/focalnet_large_fl4_o365_finetuned_on_coco.pth",
    requires="transformers",
)
prompting = dict(max_per_image=300, use_sam_iou=True)
