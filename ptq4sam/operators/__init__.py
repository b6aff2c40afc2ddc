"""The leaves that networks are made of: float forms where torch has none, and quantized forms."""

# Whoever imports one of them has all of them in the registries.
from ptq4sam.operators import (
    activation,
    attention,
    convolution,
    linear,
    linear_attention,
    norm,
    resizing,
)

__all__ = [
    "activation",
    "attention",
    "convolution",
    "linear",
    "linear_attention",
    "norm",
    "resizing",
]
