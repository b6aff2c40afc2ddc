from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4sam.prompts.detr.attention import DeformableAttention

SHAPES = [(7, 5), (4, 3), (2, 2)]
CELLS = sum(h * w for h, w in SHAPES)
DIM, HEADS, POINTS = 32, 4, 3


@pytest.fixture
def module() -> DeformableAttention:
    torch.manual_seed(0)
    module = DeformableAttention(DIM, len(SHAPES), HEADS, POINTS).eval()
    with torch.no_grad():
        # Far enough to look over the border too.
        module.sampling_offsets.bias.normal_(0, 4)
    return module


def _inputs(coordinates: int, queries: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    query, memory = torch.randn(2, queries, DIM), torch.randn(2, CELLS, DIM)
    return query, torch.rand(2, queries, coordinates), memory


@torch.no_grad()
@pytest.mark.parametrize("coordinates", [2, 4])
def test_equals_the_module_of_transformers(module: DeformableAttention, coordinates: int) -> None:
    pytest.importorskip("transformers")
    from transformers import DeformableDetrConfig, ResNetConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    config = DeformableDetrConfig(
        d_model=DIM, num_feature_levels=len(SHAPES), backbone_config=ResNetConfig()
    )
    other = theirs.DeformableDetrMultiscaleDeformableAttention(config, HEADS, POINTS).eval()
    other.load_state_dict(module.state_dict())
    query, reference, memory = _inputs(coordinates)
    shapes = torch.tensor(SHAPES)
    expected, _ = other(
        hidden_states=query,
        encoder_hidden_states=memory,
        reference_points=reference[:, :, None].expand(-1, -1, len(SHAPES), -1),
        spatial_shapes=shapes,
        spatial_shapes_list=SHAPES,
        level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
    )
    found = module(query, reference, memory, SHAPES)
    assert (found - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


@torch.no_grad()
def test_equals_bilinear_samples_that_are_taken_one_by_one(module: DeformableAttention) -> None:
    query, reference, memory = _inputs(4, queries=2)
    found = module(query, reference, memory, SHAPES)[1, 1]
    q, box = query[1, 1], reference[1, 1].numpy()
    offsets = module.sampling_offsets(q).reshape(HEADS, len(SHAPES), POINTS, 2).numpy()
    weights = module.attention_weights(q).reshape(HEADS, -1).softmax(-1)
    weights = weights.reshape(HEADS, len(SHAPES), POINTS).numpy()
    values = module.value_proj(memory[1]).reshape(CELLS, HEADS, -1).numpy()
    out = np.zeros((HEADS, DIM // HEADS))
    start = 0
    for level, (height, width) in enumerate(SHAPES):
        cells = values[start : start + height * width].reshape(height, width, HEADS, -1)
        start += height * width
        for head in range(HEADS):
            for point in range(POINTS):
                x, y = box[:2] + offsets[head, level, point] / POINTS * box[2:] / 2
                sample = _bilinear(cells[:, :, head], y * height - 0.5, x * width - 0.5)
                out[head] += weights[head, level, point] * sample
    expected = module.output_proj(torch.from_numpy(out.reshape(-1)).float())
    assert (found - expected).abs().max() < 1e-5


def _bilinear(cells: np.ndarray, row: float, column: float) -> np.ndarray:
    """Zero outside of the cells."""
    top, left = int(np.floor(row)), int(np.floor(column))
    total = np.zeros(cells.shape[-1])
    for y in (top, top + 1):
        for x in (left, left + 1):
            if 0 <= y < cells.shape[0] and 0 <= x < cells.shape[1]:
                total += cells[y, x] * (1 - abs(row - y)) * (1 - abs(column - x))
    return total
