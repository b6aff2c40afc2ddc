"""Two DETRs of the published table that no library has: H-Deformable-DETR and FocalNet-L DINO."""

from ptq4sam.prompts.detr.detector import DetrDetector

__all__ = ["DetrDetector"]
