sam = dict(type="vit_l", checkpoint="ckpt/sam_vit_l_0b3195.pth")
