"""SAM's prompt encoder: points, boxes and masks to embeddings (Kirillov et al., 2023, app. A)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptq4sam.operators.base import portable_form
from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.quantization import portable


class Positions(nn.Module):
    """Fourier features of 2-D positions.

    Args:
        matrix: [2, feats], turns for each coordinate.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encode the cell centres of a (rows, columns) grid to [2 * feats, rows, columns]."""
        device = self.positional_encoding_gaussian_matrix.device
        rows = (torch.arange(size[0], device=device) + 0.5) / size[0]
        columns = (torch.arange(size[1], device=device) + 0.5) / size[1]
        grid_y, grid_x = torch.meshgrid(rows, columns, indexing="ij")
        return self._encode(torch.stack([grid_x, grid_y], dim=-1)).permute(2, 0, 1)

    def encode_points(self, points: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Encode [..., 2] (x, y) positions in pixels of a (height, width) image."""
        size = torch.tensor([image_size[1], image_size[0]], device=points.device)
        return self._encode(points.to(torch.float32) / size)

    def _encode(self, unit: Tensor) -> Tensor:
        """Positions [..., 2] from 0 to 1 to [..., 2 * feats]."""
        raise NotImplementedError


class PositionEmbeddingRandom(Positions):
    """Random features, by torch's own functions."""

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__(torch.randn(2, num_pos_feats))

    def _encode(self, unit: Tensor) -> Tensor:
        angles = 2 * math.pi * ((2 * unit - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


@portable_form(PositionEmbeddingRandom)
class PortablePositions(Positions):
    """The same features, computed alike by every runtime; the buffer's name stays."""

    @classmethod
    def of(cls, source: PositionEmbeddingRandom) -> PortablePositions:
        """With the features of another."""
        return cls(source.positional_encoding_gaussian_matrix)

    def _encode(self, unit: Tensor) -> Tensor:
        x, y = (unit * 2.0 - 1.0).tensor_split(2, dim=-1)
        return torch.cat(waves(x, y, *self.positional_encoding_gaussian_matrix), dim=-1)


def waves(
    x: portable.X, y: portable.X, per_x: portable.X, per_y: portable.X
) -> tuple[portable.X, portable.X]:
    """Sines and cosines [..., n] of positions [..., 1] from -1 to 1, with n turns for each."""
    return portable.turn(portable.apart(x * per_x) + portable.apart(y * per_y))


class PromptEncoder(nn.Module):
    """Embed sparse prompts (points, boxes) and dense prompts (masks)."""

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int = 16,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.pe_layer: Positions = PositionEmbeddingRandom(embed_dim // 2)
        # Negative point, positive point, top-left corner, bottom-right corner.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    @property
    def mask_input_size(self) -> tuple[int, int]:
        """(height, width) of a mask prompt."""
        return (4 * self.image_embedding_size[0], 4 * self.image_embedding_size[1])

    def dense_positions(self) -> Tensor:
        """Position encoding of the image embedding: [1, embed_dim, rows, columns]."""
        positions: Tensor = self.pe_layer(self.image_embedding_size)
        return positions[None]

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts in pixels of the model's input image.

        Args:
            points: coordinates [batch, n, 2] (x, y) and labels [batch, n] (1 object,
                0 background, -1 padding).
            boxes: [batch, 4] xyxy.
            masks: logits [batch, 1, *mask_input_size].

        Returns:
            Sparse embeddings [batch, n, embed_dim] (n may be 0) and dense ones
            [batch, embed_dim, rows, columns].
        """
        given = points[0] if points is not None else boxes if boxes is not None else masks
        batch = 1 if given is None else given.shape[0]
        weight = self.no_mask_embed.weight
        sparse = weight.new_empty(batch, 0, self.embed_dim)
        if points is not None:
            # A lone point is padded by a "not a point", as the network was trained with one.
            sparse = torch.cat([sparse, self._embed_points(*points, pad=boxes is None)], dim=1)
        if boxes is not None:
            sparse = torch.cat([sparse, self._embed_boxes(boxes)], dim=1)
        if masks is not None:
            dense = self.mask_downscaling(masks)
        else:
            dense = weight.reshape(1, -1, 1, 1).expand(batch, -1, *self.image_embedding_size)
        return sparse, dense

    def _embed_points(self, coordinates: Tensor, labels: Tensor, pad: bool) -> Tensor:
        if pad:
            coordinates = torch.cat([coordinates, coordinates.new_zeros(len(labels), 1, 2)], dim=1)
            labels = torch.cat([labels, -labels.new_ones(len(labels), 1)], dim=1)
        # Pixel centres lie at half coordinates.
        embedding = self.pe_layer.encode_points(coordinates + 0.5, self.input_image_size)
        embedding = torch.where(labels[..., None] == -1, torch.zeros_like(embedding), embedding)
        kinds = {-1: "not_a_point_embed", 0: "point_embeddings.0", 1: "point_embeddings.1"}
        for label, kind in kinds.items():
            weight = self.get_parameter(f"{kind}.weight")
            embedding = embedding + (labels[..., None] == label) * weight
        return embedding

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corners = self.pe_layer.encode_points(boxes.reshape(-1, 2, 2) + 0.5, self.input_image_size)
        kinds = torch.cat([self.get_parameter(f"point_embeddings.{k}.weight") for k in (2, 3)])
        return corners + kinds
