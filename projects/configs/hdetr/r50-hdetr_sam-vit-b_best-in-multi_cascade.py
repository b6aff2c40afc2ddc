_base_ = ["./r50-hdetr_sam-vit-b.py"]

prompting = dict(best_in_multi_mask=True, cascade=True)
