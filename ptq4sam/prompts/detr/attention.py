"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", 2021, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

Shapes = Sequence[tuple[int, int]]
"""Height and width of each feature level; a memory has the cells of all of them, in this order."""


class DeformableAttention(nn.Module):
    """Attention to a few learned places of each feature level, around a point or in a box.

    Args:
        dim: channels.
        levels: feature levels.
        heads: number of heads.
        points: places that a head looks at in each level.
    """

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """Gather from the memory what each query asks for.

        Args:
            query: [batch, queries, dim].
            reference: points x, y [batch, queries, 2], around which offsets count in cells, or
                boxes cx, cy, w, h [batch, queries, 4], in which they count in parts of half the
                box; all in 0-1 of the picture.
            memory: [batch, cells of all levels, dim].
            shapes: height and width of each level.

        Returns:
            [batch, queries, dim].
        """
        batch = len(query)
        values = self.value_proj(memory).split([h * w for h, w in shapes], dim=1)
        offsets = self.sampling_offsets(query)
        offsets = offsets.unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        centres, extents = reference[:, :, None, None, :2], reference[:, :, None, None, 2:]
        gathered: Tensor | None = None
        # One level at a time: the samples of all of them are the largest tensor of a detector.
        for level, (height, width) in enumerate(shapes):
            steps = offsets[:, :, :, level]
            if reference.shape[-1] == 2:
                steps = steps / steps.new_tensor([width, height])
            else:
                steps = steps / self.points * extents * 0.5
            value = values[level].transpose(1, 2).reshape(batch * self.heads, -1, height, width)
            grid = (2 * (centres + steps) - 1).transpose(1, 2).flatten(0, 1)
            samples = functional.grid_sample(value, grid, align_corners=False)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
            part = (samples * share[:, None]).sum(-1)
            gathered = part if gathered is None else gathered + part
        if gathered is None:
            raise ValueError("deformable attention needs at least one feature level")
        output: Tensor = self.output_proj(gathered.reshape(batch, -1, query.shape[1]).mT)
        return output
