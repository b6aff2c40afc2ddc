"""Quantized models outside of the simulation: packed files, integer arithmetic, runtimes."""
