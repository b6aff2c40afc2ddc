"""Bimodal integration of post-key activations (PTQ4SAM, Lv et al. 2024, section 3.2).

Keys of some attentions form two peaks, each channel being in one of them. As q_j * k_j =
(-q_j) * (-k_j), the sign of a channel can be flipped in query and key together, which leaves the
float output as it is and brings the peaks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq4sam.methods.method import METHODS, Calibration, Method
from ptq4sam.quantization.observers import require_finite
from ptq4sam.quantization.published import BIMODAL, BimodalIntegration


@dataclass(frozen=True)
class KeyDensity:
    """Density of a key activation.

    Attributes:
        points: [n] values at which it was estimated, evenly spaced.
        values: [n] density there.
        peaks: indices of the peaks.
    """

    points: NDArray[np.float64]
    values: NDArray[np.float64]
    peaks: NDArray[np.intp]


def key_density(x: Tensor, settings: BimodalIntegration) -> KeyDensity:
    """Density of a key activation, and its peaks.

    A Gaussian kernel estimate with Scott's bandwidth of all values of the first batch element at
    `settings.global_num` points between the smallest and the largest.

    Args:
        x: [batch, ...] output of a key projection.
        settings: number of points, least height and distance of peaks.

    Raises:
        CalibrationError: `x` is empty or has values that are not finite.
    """
    require_finite(x)
    values = x[0].detach().flatten().double().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    if low == high:
        none = np.zeros(0)
        return KeyDensity(none, none, none.astype(np.intp))
    points = np.linspace(low, high, settings.global_num)
    density = scipy.stats.gaussian_kde(values)(points)
    peaks, _ = scipy.signal.find_peaks(
        density, height=settings.peak_height * density.sum(), distance=settings.peak_distance
    )
    return KeyDensity(points, density, peaks)


def is_bimodal(x: Tensor, settings: BimodalIntegration) -> bool:
    """Whether a key activation has exactly two peaks; arguments and errors as `key_density`."""
    return len(key_density(x, settings).peaks) == 2


def channel_signs(x: Tensor) -> Tensor:
    """The sign of each channel's mean, +1 for a mean of 0.

    Args:
        x: [batch, tokens, channels].

    Returns:
        [channels] of +1 and -1.
    """
    mean = x.detach().flatten(0, -2).mean(dim=0)
    # torch.sign(0) is 0 and would erase the channel.
    return torch.where(mean >= 0, 1.0, -1.0).to(x.dtype)


@torch.no_grad()
def fold_signs(query: nn.Linear, key: nn.Linear, signs: Tensor) -> None:
    """Multiply output channels of both projections by `signs` [channels] in place."""
    for layer in (query, key):
        layer.weight.mul_(signs[:, None])
        if layer.bias is not None:
            layer.bias.mul_(signs)


@torch.no_grad()
def integrate_bimodal(
    attentions: Mapping[str, tuple[nn.Linear, nn.Linear]],
    settings: BimodalIntegration,
    run_first_picture: Callable[[], object],
) -> list[str]:
    """Fold signs into query and key projections behind bimodal post-key activations.

    Args:
        attentions: query and key projection by name.
        settings: of the detection.
        run_first_picture: runs the first calibration picture, with quantizers off.

    Returns:
        Names of the attentions that were folded.
    """
    keys: dict[str, Tensor] = {}
    handles = [
        key.register_forward_hook(
            lambda _module, _inputs, output, name=name: keys.__setitem__(name, output.detach())
        )
        for name, (_, key) in attentions.items()
    ]
    try:
        run_first_picture()
    finally:
        for handle in handles:
            handle.remove()
    folded = [name for name, key in keys.items() if is_bimodal(key, settings)]
    for name in folded:
        fold_signs(*attentions[name], channel_signs(keys[name]))
    return folded


@METHODS.register(BIMODAL)
class BimodalMethod(Method[BimodalIntegration]):
    """Decided on the first picture, for attentions that the model's description lists."""

    settings_type = BimodalIntegration
    slots: ClassVar = {"key@decoder": {"observer": "AvgMSEFastObserver"}}
    """PTQ4SAM's published setting."""

    def before_ranges(self, calibration: Calibration) -> Sequence[str]:
        """Fold signs; the float output stays as it is."""
        sam = calibration.sam
        sam.folded = integrate_bimodal(
            sam.foldable(), self.settings, lambda: calibration.run(calibration.items[0])
        )
        folded: list[str] = sam.folded
        return folded
