"""A SAM, float or quantized, as ONNX graphs that compute what it computes."""
