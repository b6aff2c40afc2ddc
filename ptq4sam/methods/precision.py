"""Precision of matrix products, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from ptq4sam.errors import ConfigError
from ptq4sam.numerics import products_of


@contextlib.contextmanager
def product_precision(
    precision: Literal["float32", "bfloat16", "tf32"], device: torch.device
) -> Iterator[None]:
    """Matrix products on `device` are computed in `precision` within the `with` block.

    Args:
        precision: "bfloat16" is torch's autocast: products give bfloat16, sums stay float32 within
            them. "tf32" rounds the factors to 10 bits.
        device: where the products are made.

    Raises:
        ConfigError: TF32 on another device than a GPU.
    """
    if precision == "bfloat16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif precision == "tf32":
        if device.type != "cuda":
            raise ConfigError(
                f"recon.precision tf32 was asked for on {device}: only NVIDIA GPUs have it, use "
                "float32 or bfloat16"
            )
        with products_of("high"):
            yield
    else:
        yield
