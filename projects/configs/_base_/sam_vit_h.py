sam = dict(type="vit_h", checkpoint="ckpt/sam_vit_h_4b8939.pth")
