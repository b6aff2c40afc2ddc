"""A SAM around any image encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ptq4sam.sam.decoder_description import DECODER
from ptq4sam.sam.description import Description
from ptq4sam.sam.geometry import Geometry
from ptq4sam.sam.mask_decoder import MaskDecoder
from ptq4sam.sam.model import Sam
from ptq4sam.sam.prompt_encoder import PromptEncoder
from ptq4sam.sam.transformer import TwoWayTransformer


@dataclass(frozen=True)
class DecoderSizes:
    """Of the mask decoder; defaults are those of the official models.

    `norm_eps` is that of the layer normalisations of its transformer.
    """

    mlp_dim: int = 2048
    heads: int = 8
    depth: int = 2
    iou_hidden_dim: int = 256
    norm_eps: float = 1e-5


def assemble(
    name: str,
    encoder: nn.Module,
    geometry: Geometry,
    description: Description,
    sizes: DecoderSizes = DecoderSizes(),
) -> Sam:
    """Put a prompt encoder and a mask decoder with random weights behind an encoder.

    Args:
        name: of the variant.
        encoder: gives features as the geometry says.
        geometry: of its pictures.
        description: of the encoder.
        sizes: of the decoder.
    """
    dim, rows, columns = geometry.features[0]
    side = geometry.prompt_side
    prompt_encoder = PromptEncoder(dim, (rows, columns), (side, side))
    transformer = TwoWayTransformer(
        sizes.depth, dim, sizes.heads, sizes.mlp_dim, norm_eps=sizes.norm_eps
    )
    decoder = MaskDecoder(dim, transformer, iou_head_hidden_dim=sizes.iou_hidden_dim)
    sam = Sam(name, encoder, prompt_encoder, decoder, geometry, description + DECODER)
    return sam.eval()
