"""Layers shared by the parts of SAM."""

from __future__ import annotations

from torch import Tensor, nn


class MLPBlock(nn.Module):
    """Two linear layers with an activation between them, on the last axis."""

    def __init__(self, dim: int, hidden_dim: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        projected: Tensor = self.lin2(self.act(self.lin1(x)))
        return projected
