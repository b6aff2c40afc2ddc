"""SAM's mask decoder: image embedding and prompt embeddings to masks and predicted IoUs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.sam.stages import State
from ptq4sam.sam.transformer import TwoWayTransformer


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., input_dim] to [..., output_dim]."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        projected: Tensor = self.layers[-1](x)
        return projected


class MaskDecoder(nn.Module):
    """Predict one mask (token 0) or three masks (tokens 1-3) for a prompt."""

    def __init__(
        self,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3)
            for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(
            transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompts: Tensor,
        dense_prompts: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for one image.

        Args:
            image_embeddings: [1, dim, rows, columns].
            image_pe: [1, dim, rows, columns].
            sparse_prompts: [prompts, n, dim].
            dense_prompts: [prompts, dim, rows, columns].
            multimask_output: three masks a prompt instead of one.

        Returns:
            Mask logits [prompts, 3 or 1, 4 * rows, 4 * columns] and IoUs [prompts, 3 or 1].
        """
        masks, ious = self.predict_all(image_embeddings, image_pe, sparse_prompts, dense_prompts)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, chosen], ious[:, chosen]

    def predict_all(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All four masks of every prompt; arguments as for `forward`.

        `image_embeddings` may also be [prompts, ...], one image a prompt (used in training).
        """
        tokens, image = self.attend(image_embeddings, image_pe, sparse, dense)
        return self.heads(tokens, image, (dense.shape[2], dense.shape[3]))

    def heads(self, tokens: Tensor, image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """All four masks of every prompt, from what the transformer gives.

        Args:
            tokens: [prompts, n, dim].
            image: [prompts, rows * columns, dim].
            grid: rows and columns.

        Returns:
            Mask logits [prompts, 4, 4 * rows, 4 * columns] and IoUs [prompts, 4].
        """
        ious = self.iou_prediction_head(tokens[:, 0])
        features = image.transpose(1, 2).reshape(len(image), image.shape[2], *grid)
        upscaled = self.output_upscaling(features)
        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens].unbind(1)
        weights = torch.stack(
            [
                mlp(token)
                for mlp, token in zip(self.output_hypernetworks_mlps, mask_tokens, strict=True)
            ],
            dim=1,
        )
        masks = (weights @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])
        return masks, ious

    def attend(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two-way transformer alone: tokens [prompts, n, dim], image [prompts, cells, dim]."""
        attended: tuple[Tensor, Tensor] = self.transformer(
            *self._transformer_inputs(image_embeddings, image_pe, sparse, dense)
        )
        return attended

    def begin(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> State:
        """The state before the transformer's first stage; arguments as for `forward`."""
        return self.transformer.begin(
            *self._transformer_inputs(image_embeddings, image_pe, sparse, dense)
        )

    def _transformer_inputs(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        return image_embeddings + dense, image_pe, tokens
