"""The devices that tests of numbers run on."""

from __future__ import annotations

import pytest
import torch

on_devices = pytest.mark.parametrize(
    "device",
    [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)],
    ids=str,
)
"""Runs a test that takes `device` on a CPU, and on a GPU where there is one."""
