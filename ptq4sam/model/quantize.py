"""Quantize a SAM: insert quantizers, calibrate, reconstruct, freeze."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ptq4sam import parallel
from ptq4sam.errors import ConfigError
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.calibrated import CalibratedState
from ptq4sam.model.calibration import CalibrationItem, apply_methods, calibrate, methods_with
from ptq4sam.model.engine import reconstruct
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers
from ptq4sam.model.journal import CALIBRATED, Journal
from ptq4sam.model.plan import Plan
from ptq4sam.model.published import keep_published_defects
from ptq4sam.operators.base import put_weights_on_grid, weight_quantizers
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.threads import suited_to_model


@suited_to_model
def quantize_sam(
    sam: Sam,
    items: Sequence[CalibrationItem],
    scheme: Scheme,
    *,
    quantize_encoder: bool = True,
    seed: int = 0,
    progress: Progress = silent,
    cache: ActivationCache | None = None,
    journal: Journal | None = None,
    plan: Plan | None = None,
    calibrated: CalibratedState | None = None,
) -> QuantizedSam:
    """Calibrate, reconstruct where the scheme says so, and freeze; the float SAM is not touched.

    Several processes (see `parallel`) share the calibration; the first one reconstructs.

    Args:
        sam: the float model.
        items: calibration pictures with their boxes.
        scheme: the quantization.
        quantize_encoder: quantize the image encoder too; else only the mask decoder.
        seed: fixes every random choice of the reconstruction.
        progress: shows how far it is.
        cache: where captured activations live; by default half of the free memory, then the disk.
        journal: keeps what is finished, and gives back what was finished before; the first
            process's only.
        plan: tells which share of the work is done.
        calibrated: of an earlier calibration of the same model, pictures and scheme (but for its
            reconstruction), which is then not done again.

    Raises:
        ConfigError: a method works behind the freezing that compat: published leaves out.
        CalibrationError: calibration data are empty or not finite, or a unit diverged.
        ResourceError: activations fit nowhere.
    """
    correcting = methods_with(scheme, "after_reconstruction")
    if correcting and scheme.compat == "published":
        raise ConfigError(
            f"asked for {', '.join(correcting)} with compat: published, which leaves no frozen "
            "model to correct: use compat: faithful"
        )
    quantized = insert_quantizers(sam, scheme, quantize_encoder)
    if calibrated is not None:
        calibrated.restore(quantized)
    elif not parallel.from_first(lambda: journal and journal.restore_model(CALIBRATED, quantized)):
        calibrate(quantized, items, progress)
        if journal is not None:
            journal.record_model(CALIBRATED, quantized)
    exact = exact_copy(quantized) if correcting and parallel.is_first() else None
    if scheme.recon is not None and parallel.is_first():
        reconstruct(
            quantized,
            items,
            scheme.recon,
            seed=seed,
            progress=progress,
            cache=cache,
            journal=journal,
            plan=plan,
        )
    parallel.copy_state_of_first(quantized)
    quantized.folded = parallel.from_first(lambda: quantized.folded)
    if scheme.compat == "published":
        keep_published_defects(quantized, seed)
    else:
        freeze(quantized)
        if exact is not None:
            apply_methods(quantized, items, "after_reconstruction", exact)
        parallel.copy_state_of_first(quantized)
    return quantized


def exact_copy(sam: QuantizedSam) -> QuantizedSam:
    """A copy of a calibrated model with its quantizers off."""
    copied = copy.deepcopy(sam)
    for _, quantizer in quantizers(copied):
        quantizer.mode = Mode.FLOAT
    return copied


def freeze(sam: QuantizedSam) -> None:
    """Put every weight on its grid for good; rounding to nearest then changes nothing."""
    put_weights_on_grid(sam)
    for quantizer in weight_quantizers(sam):
        quantizer.freeze()
