_base_ = ["./r50-hdetr_sam-vit-b.py"]

prompting = dict(cascade=True)
