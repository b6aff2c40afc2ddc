"""Post-training quantization of the Segment Anything Model: PTQ4SAM and beyond."""

__version__ = "0.1.0"
