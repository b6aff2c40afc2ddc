"""Quantization-aware fine-tuning: a student that keeps its quantizers while it learns.

Weights learn straight through the rounding; scales of weights and activations learn as in LSQ
(Esser et al. 2020), of grids of the scheme's own wherever these have scales that learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from ptq4sam import parallel
from ptq4sam.errors import ConfigError
from ptq4sam.model.calibration import CalibrationItem, calibrate, methods_with
from ptq4sam.model.float_weights import round_float_weights
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.journal import BEGUN, Journal
from ptq4sam.model.quantize import freeze, quantize_sam
from ptq4sam.operators.base import quantized_operators
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import AffineQuantizer, FixedQuantizer, LSQQuantizer
from ptq4sam.quantization.rounding import AdaRoundQuantizer
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam


def require_tunable(scheme: Scheme) -> None:
    """Refuse a scheme whose methods work on a frozen model, which learning would undo.

    Raises:
        ConfigError: it is one.
    """
    correcting = methods_with(scheme, "after_reconstruction")
    if correcting:
        raise ConfigError(
            f"asked to train with {', '.join(correcting)}, which corrects a model that learns no "
            "more: use a scheme without"
        )
    if scheme.compat != "faithful":
        raise ConfigError(
            f"asked to train with compat: {scheme.compat}, whose models stay simulations: use "
            "compat: faithful"
        )


def begin_quantized(
    sam: Sam,
    scheme: Scheme,
    items: Sequence[CalibrationItem],
    *,
    quantize_encoder: bool = True,
    seed: int = 0,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> QuantizedSam:
    """A student that starts from a calibrated model, reconstructed where the scheme says so.

    Args:
        sam: the float model, which is not touched.
        scheme: the quantization.
        items: calibration pictures.
        quantize_encoder: quantize the image encoder too.
        seed: fixes every random choice of the reconstruction.
        progress: shows how far it is.
        journal: keeps what is finished, and gives back what was finished before; the first
            process's only.
    """
    quantized = insert_quantizers(sam, scheme, quantize_encoder)
    if parallel.from_first(lambda: journal and journal.restore_model(BEGUN, quantized)):
        parallel.copy_state_of_first(quantized)
        quantized.folded = parallel.from_first(lambda: quantized.folded)
        return quantized
    if scheme.recon is not None:
        quantized = quantize_sam(
            sam,
            items,
            scheme,
            quantize_encoder=quantize_encoder,
            seed=seed,
            progress=progress,
            journal=journal,
        )
    else:
        # Not frozen: what lies between the points of a grid is where learning goes on.
        calibrate(quantized, items, progress)
    if journal is not None:
        journal.record_model(BEGUN, quantized)
    return quantized


def learn_scales(sam: QuantizedSam) -> dict[str, AffineQuantizer]:
    """Let scales learn that the scheme has fixed, of weights and of activations.

    Returns:
        The quantizers that others took the places of, by path; `finish_quantized` puts them back
        with what was learned, so that the model is what its scheme says.
    """
    replaced: dict[str, AffineQuantizer] = {}
    for name, operator in quantized_operators(sam):
        for slot, before in operator.slots().items():
            if type(before) not in (AdaRoundQuantizer, FixedQuantizer):
                continue
            own = cast(FixedQuantizer, before)
            # What a method adds to a weight before it is quantized belongs to its grid; scales of
            # groups are powers of two of one step.
            if own.correction.numel() == 0 and own.group_size is None:
                learner = LSQQuantizer(own.grid, channel_axis=own.channel_axis)
                learner.name = own.name
                learner.to(own.scale.device)
                learner.set_parameters(own.scale.clone(), own.zero_point.clone())
                setattr(operator, f"{slot}_quantizer", learner)
                replaced[f"{name}.{slot}_quantizer"] = own
    return replaced


def finish_quantized(sam: QuantizedSam, replaced: Mapping[str, AffineQuantizer]) -> None:
    """Leave an ordinary quantized model: scales usable, weights on their grids.

    Args:
        sam: that has learned.
        replaced: what `learn_scales` gave.
    """
    sam.eval()
    for _, quantizer in quantizers(sam):
        if quantizer.learned():
            quantizer.constrain_()
            quantizer.finish_learning()
    for path, own in replaced.items():
        operator, _, slot = path.rpartition(".")
        owner = sam.get_submodule(operator)
        learner = cast(LSQQuantizer, getattr(owner, slot))
        own.set_parameters(*learner.parameters_in_use())
        setattr(owner, slot, own)
    if sam.scheme.float_weights == "float16":
        round_float_weights(sam)
    freeze(sam)
    sam.requires_grad_(False)
