"""The integer reference: a quantized SAM computed with codes and integer sums, in plain torch."""

from ptq4sam.deploy.integer.model import integer_model

__all__ = ["integer_model"]
