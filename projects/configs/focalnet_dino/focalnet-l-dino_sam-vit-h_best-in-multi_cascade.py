_base_ = ["./focalnet-l-dino_sam-vit-h.py"]

prompting = dict(best_in_multi_mask=True, cascade=True)
