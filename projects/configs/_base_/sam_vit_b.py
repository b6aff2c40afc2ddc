sam = dict(type="vit_b", checkpoint="ckpt/sam_vit_b_01ec64.pth")
