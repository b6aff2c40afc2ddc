"""H-Deformable-DETR R50; every query's box goes to SAM, and COCO's AP counts the best 100 masks."""

_name = "r50_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_deformable_detr_plus_iterative_bbox"

detector = dict(
    type="hdetr",
    checkpoint="ckpt/" + _name + "_refinement_plus_plus_two_stage_36eps.pth",
    requires="mmdet",
)
prompting = dict(max_per_image=300, use_sam_iou=True)
