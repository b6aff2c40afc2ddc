"""`compat: published`: two defects of the published implementation, to reproduce its table.

1. Its random dropping stays on at every layer input after reconstruction, so that half of those
   activations are float at evaluation.
2. Only the first layer of a unit is rounded hard; the others keep soft weights off the grid.

A unit has them from the end of its reconstruction on, so that the units behind it are learned on
what it then gives. Numbers of such a model are not those of a quantized model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn

from ptq4sam.model.insertion import QuantizedSam, model_units
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.recon import Reconstruction

_log = logging.getLogger(__name__)

WARNING = (
    "compat: published keeps two defects of the published implementation (half of the layer inputs "
    "float, soft weights): the numbers of this run are not those of a quantized model"
)

_DROP = 0.5
"""What the published implementation drops by; it does so after --brecq too, which learns without
dropping."""


def keep_defects(module: nn.Module, settings: Reconstruction, generator: torch.Generator) -> None:
    """Leave what was just reconstructed, a unit or a layer, as the published implementation does.

    Args:
        module: its quantizers have learned.
        settings: of the reconstruction.
        generator: source of the dropping from now on.
    """
    for index, (_, layer) in enumerate(quantized_layers(module)):
        drop = _DROP if settings.weights_only else settings.drop_prob
        layer.input_quantizer.drop_probability = drop
        layer.input_quantizer.generator = generator
        if index > 0:
            layer.weight_quantizer.stay_soft()


def keep_published_defects(sam: QuantizedSam, seed: int) -> None:
    """Leave a reconstructed model as the published implementation evaluates it.

    The same for every process, also for those that took the state of the one that reconstructed.
    """
    if sam.scheme.recon is None:
        return
    _log.warning(WARNING)
    generator = torch.Generator(sam.device)
    generator.manual_seed(seed)
    for module in _reconstructed(sam, sam.scheme.recon):
        keep_defects(module, sam.scheme.recon, generator)


def _reconstructed(sam: QuantizedSam, settings: Reconstruction) -> Iterator[nn.Module]:
    """What is learned at once: units, or each of their layers."""
    for _, unit in model_units(sam, joint=settings.granularity == "joint"):
        if settings.granularity != "layer":
            yield unit
        else:
            yield from (layer for _, layer in quantized_layers(unit))
