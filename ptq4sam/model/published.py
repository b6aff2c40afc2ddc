"""`compat: published`: two defects of the published implementation, to reproduce its table.

1. Its random dropping stays on at every layer input after reconstruction, so that half of those
   activations are float at evaluation.
2. Only the first layer of a unit is rounded hard; the others keep soft weights off the grid.

Numbers of such a model are not those of a quantized model.
"""

from __future__ import annotations

import logging

import torch

from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.model.layers import quantized_layers
from ptq4sam.quantization.rounding import AdaRoundQuantizer

_log = logging.getLogger(__name__)

WARNING = (
    "compat: published keeps two defects of the published implementation (half of the layer inputs "
    "float, soft weights): the numbers of this run are not those of a quantized model"
)


def soft_layers(sam: QuantizedSam) -> set[str]:
    """Paths of the layers that the published implementation leaves soft: all but a unit's first."""
    soft: set[str] = set()
    for name, unit in model_units(sam):
        paths = [".".join(filter(None, (name, inner))) for inner, _ in quantized_layers(unit)]
        soft.update(paths[1:])
    return soft


def keep_published_defects(sam: QuantizedSam, seed: int) -> None:
    """Leave a reconstructed model as the published implementation evaluates it."""
    if sam.scheme.recon is None:
        return
    _log.warning(WARNING)
    generator = torch.Generator(sam.device)
    generator.manual_seed(seed)
    soft = soft_layers(sam)
    for name, layer in quantized_layers(sam):
        layer.input_quantizer.drop_probability = sam.scheme.recon.drop_prob
        layer.input_quantizer.generator = generator
        quantizer = layer.weight_quantizer
        if name in soft and isinstance(quantizer, AdaRoundQuantizer) and quantizer.has_learned:
            quantizer.rounding = "soft"
