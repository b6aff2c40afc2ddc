"""SAM as a whole: the three parts, and pictures in and out of the model's square input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.sam.image_encoder import ImageEncoderViT
from ptq4sam.sam.mask_decoder import MaskDecoder
from ptq4sam.sam.prompt_encoder import PromptEncoder

_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)


class Sam(nn.Module):
    """A Segment Anything model; parameter names are those of the official checkpoints."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        name: str,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
    ) -> None:
        super().__init__()
        self.name = name
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        mean, std = torch.tensor(_PIXEL_MEAN), torch.tensor(_PIXEL_STD)
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

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Normalise [..., 3, height, width] (0-255) and pad it at the right and bottom."""
        normalized = (pixels - self.pixel_mean) / self.pixel_std
        height, width = normalized.shape[-2:]
        return F.pad(normalized, (0, self.image_size - width, 0, self.image_size - height))

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
        side = (self.image_size, self.image_size)
        masks = F.interpolate(masks, side, mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)
