"""A SAM, float or quantized, as ONNX graphs that compute what it computes."""

from ptq4sam.deploy.onnx import functions, layers, linear_attention, positions, resizing

__all__ = ["functions", "layers", "linear_attention", "positions", "resizing"]
