"""Masks of everything in a picture, without prompts (Segment Anything, appendix B)."""

from ptq4sam.everything.generator import MaskGenerator
from ptq4sam.everything.masks import FoundMasks
from ptq4sam.everything.settings import EverythingSettings, Hierarchical
from ptq4sam.everything.tally import Tally

__all__ = ["EverythingSettings", "FoundMasks", "Hierarchical", "MaskGenerator", "Tally"]
