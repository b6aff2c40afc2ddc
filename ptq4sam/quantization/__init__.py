"""Grids, observers, quantizers, rounding and schemes: tensor mathematics that knows no model."""
