"""H-Deformable-DETR R50; its best 100 boxes go to SAM."""

_name = "r50_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_deformable_detr_plus_iterative_bbox"

detector = dict(
    type="hdetr",
    checkpoint="ckpt/" + _name + "_refinement_plus_plus_two_stage_36eps.pth",
)
prompting = dict(max_per_image=100, use_sam_iou=True)
