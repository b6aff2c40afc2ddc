"""SAM as a whole: the three parts, and pictures in and out of the model's square input."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.sam.image_encoder import ImageEncoderViT
from ptq4sam.sam.mask_decoder import MaskDecoder
from ptq4sam.sam.prompt_encoder import PromptEncoder


class Normalization(NamedTuple):
    """What pictures are normalised by, by channel (red, green, blue), of values 0 to 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


SAM_NORMALIZATION = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""SAM's own."""


class PromptableModel(Protocol):
    """What `Predictor` needs of a model, wherever it runs."""

    name: str

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""

    @property
    def device(self) -> torch.device:
        """Where tensors are taken and given."""

    @property
    def mask_input_size(self) -> tuple[int, int]:
        """(height, width) of a mask prompt and of low-resolution masks."""

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one picture's embedding."""

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Normalise [..., 3, height, width] (0-255) and pad it to the square input."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Preprocessed pictures [batch, 3, side, side] to [batch, channels, rows, columns]."""

    def decode(
        self,
        features: Tensor,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """Masks of prompts on one picture; see `Sam.decode`."""

    def postprocess_masks(
        self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> Tensor:
        """Resize mask logits to the original picture."""


class Sam(nn.Module):
    """A Segment Anything model; parameter names are those of the official checkpoints.

    Attributes:
        name: of its variant.
        normalization: what pictures are normalised by.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        name: str,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        normalization: Normalization = SAM_NORMALIZATION,
    ) -> None:
        super().__init__()
        self.name = name
        self.normalization = normalization
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.prompt_encoder.input_image_size[0]

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.pixel_mean.device

    @property
    def mask_input_size(self) -> tuple[int, int]:
        """(height, width) of a mask prompt and of low-resolution masks."""
        return self.prompt_encoder.mask_input_size

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one picture's embedding."""
        rows, columns = self.prompt_encoder.image_embedding_size
        itemsize = self.prompt_encoder.no_mask_embed.weight.element_size()
        return itemsize * self.prompt_encoder.embed_dim * rows * columns

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Normalise [..., 3, height, width] (0-255) and pad it at the right and bottom."""
        return normalize(pixels, self.pixel_mean, self.pixel_std, self.image_size)

    def embed(self, pixels: Tensor) -> Tensor:
        """Preprocessed pictures [batch, 3, side, side] to [batch, channels, rows, columns]."""
        features: Tensor = self.image_encoder(pixels)
        return features

    def decode(
        self,
        features: Tensor,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """Masks of prompts on one picture; those given together belong together row by row.

        Args:
            features: the picture's embedding [1, channels, rows, columns].
            points: coordinates [prompts, n, 2] in pixels of the input and labels [prompts, n].
            boxes: [prompts, 4] xyxy in pixels of the input.
            masks: [prompts, 1, *mask_input_size] logits of an earlier prediction.
            multimask: three masks a prompt instead of one.

        Returns:
            Mask logits [prompts, 3 or 1, *mask_input_size] and predicted IoUs [prompts, 3 or 1].
        """
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        positions = self.prompt_encoder.dense_positions()
        decoded: tuple[Tensor, Tensor] = self.mask_decoder(
            features, positions, sparse, dense, multimask
        )
        return decoded

    def postprocess_masks(
        self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> Tensor:
        """Resize mask logits to the original picture.

        Args:
            masks: [prompts, masks, height, width] low-resolution logits.
            input_size: (height, width) of the resized picture before padding.
            original_size: (height, width) of the picture.

        Returns:
            [prompts, masks, *original_size] logits.
        """
        return resize_masks(masks, self.image_size, input_size, original_size)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor, side: int) -> Tensor:
    """Normalise [..., 3, height, width] and pad it at the right and bottom to a square."""
    normalized = (pixels - mean) / std
    height, width = normalized.shape[-2:]
    return F.pad(normalized, (0, side - width, 0, side - height))


def resize_masks(
    masks: Tensor, side: int, input_size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """Logits of the padded square input to those of the picture; see `Sam.postprocess_masks`."""
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
    masks = masks[..., : input_size[0], : input_size[1]]
    return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)
