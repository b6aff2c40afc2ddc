"""SAM as a whole: the three parts, and pictures in and out of the model's square input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam.sam.description import Description
from ptq4sam.sam.geometry import Geometry, Normalization
from ptq4sam.sam.mask_decoder import MaskDecoder
from ptq4sam.sam.prompt_encoder import PromptEncoder
from ptq4sam.sam.transformer import TwoWayTransformer

Features: TypeAlias = tuple[Tensor, ...]
"""What an encoder hands over; the first is the image embedding [batch, channels, rows, columns]."""


class PromptableModel(Protocol):
    """What `Predictor` needs of a model, wherever it runs."""

    name: str

    @property
    def geometry(self) -> Geometry:
        """Of its pictures."""

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

    def embed(self, pixels: Tensor) -> Features:
        """Preprocessed pictures [batch, 3, side, side] to what the encoder hands over."""

    def decode(
        self,
        features: Features,
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
        geometry: of its pictures.
        description: of its networks.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        name: str,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        geometry: Geometry,
        description: Description,
    ) -> None:
        super().__init__()
        self.name = name
        self.geometry = geometry
        self.description = description
        self.image_encoder: Any = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        mean, std = map(torch.tensor, geometry.normalization)
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    def normalized_by(self, normalization: Normalization) -> Sam:
        """The same model, of these parts, for pictures that are normalised by something else."""
        parts = (self.image_encoder, self.prompt_encoder, self.mask_decoder)
        geometry = replace(self.geometry, normalization=normalization)
        return Sam(self.name, *parts, geometry, self.description)

    @property
    def normalization(self) -> Normalization:
        """What pictures are normalised by."""
        return self.geometry.normalization

    @property
    def image_size(self) -> int:
        """Side of the encoder's square input in pixels."""
        return self.geometry.encoder_side

    @property
    def transformer(self) -> TwoWayTransformer:
        """Of the mask decoder: the network at `description.TRANSFORMER`."""
        return self.mask_decoder.transformer

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
        side = self.geometry.encoder_side
        return normalize(pixels, self.pixel_mean, self.pixel_std, side)

    def embed(self, pixels: Tensor) -> Features:
        """Preprocessed pictures [batch, 3, side, side] to what the encoder hands over.

        The first tensor is the image embedding [batch, channels, rows, columns].
        """
        features: Tensor | Features = self.image_encoder(pixels)
        return (features,) if isinstance(features, Tensor) else tuple(features)

    def decode(
        self,
        features: Features,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """Masks of prompts on one picture; those given together belong together row by row.

        Args:
            features: of the picture, see `embed`.
            points: coordinates [prompts, n, 2] in pixels of the prompts' square and labels
                [prompts, n].
            boxes: [prompts, 4] xyxy in pixels of that square.
            masks: [prompts, 1, *mask_input_size] logits of an earlier prediction.
            multimask: three masks a prompt instead of one.

        Returns:
            Mask logits [prompts, 3 or 1, *mask_input_size] and predicted IoUs [prompts, 3 or 1].
        """
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        positions = self.prompt_encoder.dense_positions()
        embedding, *others = features
        decoded: tuple[Tensor, Tensor] = self.mask_decoder(
            embedding, positions, sparse, dense, multimask, *others
        )
        return decoded

    def postprocess_masks(
        self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> Tensor:
        """Resize mask logits to the original picture.

        Args:
            masks: [prompts, masks, height, width] low-resolution logits.
            input_size: (height, width) of the picture in the prompts' square.
            original_size: (height, width) of the picture.

        Returns:
            [prompts, masks, *original_size] logits.
        """
        return resize_masks(masks, self.geometry.prompt_side, input_size, original_size)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor, side: int) -> Tensor:
    """Normalise [..., 3, height, width] and pad it at the right and bottom to a square."""
    normalized = (pixels - mean) / std
    height, width = normalized.shape[-2:]
    return F.pad(normalized, (0, side - width, 0, side - height))


def resize_masks(
    masks: Tensor, side: int, input_size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """Logits of the prompts' square to those of the picture; see `Sam.postprocess_masks`."""
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
    masks = masks[..., : input_size[0], : input_size[1]]
    return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)
