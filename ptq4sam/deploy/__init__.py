"""From a quantized SAM to files that other programs run."""
