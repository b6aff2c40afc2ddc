"""Two DETRs of the published table that no library has: H-Deformable-DETR and FocalNet-L DINO."""

from ptq4sam.prompts.detr.detector import DETR_VARIANTS, DetrDetector

__all__ = ["DETR_VARIANTS", "DetrDetector"]
