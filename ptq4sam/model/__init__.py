"""How a SAM becomes a quantized SAM: quantized blocks, insertion, calibration, audit, storage."""
