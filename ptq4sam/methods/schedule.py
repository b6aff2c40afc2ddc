"""How far a reconstruction is, and what follows from it."""

from __future__ import annotations

import math

from ptq4sam.quantization.recon import Reconstruction

_LEAST_FALL = 1e-3
"""Relative fall of the mean loss that counts as one."""


class Schedule:
    """How far a reconstruction is, from 0 to 1, and what follows from it.

    Without patience it goes evenly over all steps. With patience, a loss that has not fallen for so
    many steps makes the rest of the schedule pass within as many steps, so that the rounding still
    hardens and the learning rate still falls to 0.
    """

    def __init__(self, settings: Reconstruction) -> None:
        self._settings = settings
        # Whole numbers: a sum of shares would reach the end of the warm-up a step late.
        self._origin, self._made, self._length = 0.0, 0, settings.iters
        self._least, self._since, self._hurrying = math.inf, 0, False

    @property
    def position(self) -> float:
        """0 at the first step, 1 after the last."""
        return self._origin + (1 - self._origin) * (self._made / self._length)

    @property
    def ended(self) -> bool:
        """Whether all steps were made."""
        return self._made == self._length

    def advance(self) -> None:
        """One step was made."""
        self._made += 1

    def hear(self, loss: float, steps: int) -> None:
        """Take into account the mean loss of the last `steps` steps."""
        patience = self._settings.patience
        if patience == 0 or self._hurrying:
            return
        if loss < self._least * (1 - _LEAST_FALL):
            self._least, self._since = loss, 0
            return
        self._since += steps
        if self._since >= patience:
            self._hurrying = True
            left = min(self._length - self._made, patience)
            self._origin, self._made, self._length = self.position, 0, left

    def temperature(self) -> float | None:
        """Exponent beta of AdaRound's regulariser; None during the warm-up."""
        start = self._settings.warm_up
        if self.position < start:
            return None
        high, low = self._settings.b_range
        done = (self.position - start) / (1 - start)
        return low + (high - low) * max(0.0, 1 - done)

    def scale_rate(self) -> float:
        """Learning rate of activation scales: a cosine from the first one to 0."""
        return self._settings.scale_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self.position)))
