"""Quantized models outside of the simulation: packed files, integer arithmetic, runtimes."""

from ptq4sam.deploy.integer import integer_model

__all__ = ["integer_model"]
