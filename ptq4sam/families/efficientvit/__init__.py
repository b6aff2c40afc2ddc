"""EfficientViT SAMs: L0, L1 and L2 of 512 pixels, XL0 and XL1 of 1024; a small one of 256."""
