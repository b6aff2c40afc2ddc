"""A small SAM learns from a large one, or a quantized one from what it was made of."""
