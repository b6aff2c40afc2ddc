"""Quantize a SAM: insert quantizers, calibrate, reconstruct, freeze."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ptq4sam.methods.reconstruction import UnitData, reconstruct_unit
from ptq4sam.model.calibration import CalibrationItem, calibrate, run_decoder
from ptq4sam.model.capture import capture_unit
from ptq4sam.model.insertion import (
    QuantizedSam,
    encoder_units,
    insert_quantizers,
    transformer_units,
)
from ptq4sam.model.layers import put_weights_on_grid, quantized_layers, weight_quantizers
from ptq4sam.model.published import keep_published_defects
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import quantizer_mode
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Reconstruction, Scheme
from ptq4sam.sam.model import Sam

_log = logging.getLogger(__name__)

Runs = list[Callable[[], object]]


def quantize_sam(
    sam: Sam,
    items: Sequence[CalibrationItem],
    scheme: Scheme,
    *,
    quantize_encoder: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> QuantizedSam:
    """Calibrate, reconstruct where the scheme says so, and freeze; the float SAM is not touched.

    Args:
        sam: the float model.
        items: calibration pictures with their boxes.
        scheme: the quantization.
        quantize_encoder: quantize the image encoder too; else only the mask decoder.
        seed: fixes every random choice of the reconstruction.
        progress: shows how far it is.

    Raises:
        CalibrationError: calibration data are empty or not finite, or a unit diverged.
    """
    quantized = insert_quantizers(sam, scheme, quantize_encoder)
    calibrate(quantized, items, progress)
    if scheme.recon is not None:
        reconstruct(quantized, items, scheme.recon, seed=seed, progress=progress)
    if scheme.compat == "published":
        keep_published_defects(quantized, seed)
    else:
        freeze(quantized)
    return quantized


def reconstruct(
    sam: QuantizedSam,
    items: Sequence[CalibrationItem],
    settings: Reconstruction,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Reconstruct every unit of a calibrated model in execution order.

    The float targets come from the same model with its quantizers off, so that signs folded by
    bimodal integration are in both.
    """
    reconstructor = _Reconstructor(sam, settings, seed, progress)
    encoder, decoder = sam.image_encoder, sam.mask_decoder.transformer
    if sam.encoder_quantized:
        runs: Runs = [functools.partial(encoder, item.pixels.to(sam.device)) for item in items]
        reconstructor.run(encoder_units(encoder), runs, runs)
    with torch.no_grad():
        with quantizer_mode(sam, Mode.FLOAT):
            exact = [encoder(item.pixels.to(sam.device)) for item in items]
        features = [encoder(item.pixels.to(sam.device)) for item in items]
    boxes = [item.boxes for item in items]
    reconstructor.run(
        transformer_units(decoder),
        [functools.partial(run_decoder, sam, *pair) for pair in zip(features, boxes, strict=True)],
        [functools.partial(run_decoder, sam, *pair) for pair in zip(exact, boxes, strict=True)],
    )


class _Reconstructor:
    """Captures and reconstructs one unit after the other."""

    def __init__(
        self, sam: QuantizedSam, settings: Reconstruction, seed: int, progress: Progress
    ) -> None:
        self._sam, self._settings, self._progress = sam, settings, progress
        self._seed = seed
        self._done = 0

    def run(self, units: list[tuple[str, nn.Module]], runs: Runs, float_runs: Runs) -> None:
        for name, module in self._split(units):
            with self._activations():
                captured = capture_unit(module, runs)
                with quantizer_mode(self._sam, Mode.FLOAT):
                    exact = capture_unit(module, float_runs)
                data = UnitData(captured.inputs, exact.inputs, exact.outputs)
                generator = torch.Generator(self._sam.device)
                generator.manual_seed(self._seed * 100_003 + self._done)
                pairs = [
                    (layer.weight, layer.weight_quantizer) for _, layer in quantized_layers(module)
                ]
                losses = reconstruct_unit(
                    module,
                    pairs,
                    data,
                    self._settings,
                    generator,
                    functools.partial(self._progress, description=f"reconstructing {name}"),
                )
            self._done += 1
            _log.info(
                "reconstructed %s: error %.4g before, %.4g after", name, losses.before, losses.after
            )

    def _split(self, units: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
        if self._settings.granularity == "unit":
            return units
        return [
            (".".join(filter(None, (name, inner))), layer)
            for name, unit in units
            for inner, layer in quantized_layers(unit)
        ]

    def _activations(self) -> contextlib.AbstractContextManager[None]:
        """Activations stay float while a weights-only method (BRECQ) reconstructs."""
        if not self._settings.weights_only:
            return contextlib.nullcontext()
        weights = set(map(id, weight_quantizers(self._sam)))
        return quantizer_mode(self._sam, Mode.FLOAT, lambda q: id(q) not in weights)


def freeze(sam: QuantizedSam) -> None:
    """Put every weight on its grid for good; rounding to nearest then changes nothing."""
    put_weights_on_grid(sam)
    for quantizer in weight_quantizers(sam):
        if isinstance(quantizer, AdaRoundQuantizer):
            quantizer.forget_learning()
