"""How a SAM becomes a quantized SAM: insertion, calibration, reconstruction, freezing, audit."""
