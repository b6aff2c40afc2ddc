"""The public verbs `quantize` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptq4sam.data import ImageSet
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.numerics import reproducible, require_float64
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import GroundTruth, PromptSource, open_prompts
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.calibration import calibration_pictures, order_seed
from ptq4sam.sam.model import Sam


@reproducible()
def quantize(
    sam: Sam,
    calibration: ImageSet | Sequence[CalibrationItem],
    scheme: Scheme | str | Path,
    *,
    prompts: PromptSource | None = None,
    quantize_encoder: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> QuantizedSam:
    """Calibrate, reconstruct where the scheme says so, and freeze; `sam` itself is not changed.

    Args:
        sam: the float model.
        calibration: a data set, of which the first pictures with boxes are used (as many as the
            scheme says), or calibration items. Boxes are enough: CocoDataset(..., masks=False).
        scheme: the quantization, the name of one that ships, or a YAML file that describes it.
        prompts: boxes of the calibration pictures; ground truth by default, which a plain folder
            of pictures does not have.
        quantize_encoder: quantize the image encoder too, not only the mask decoder.
        seed: fixes every random choice.
        progress: shows how far it is.

    Raises:
        ConfigError: the scheme or the model's device is not usable.
        CalibrationError: the calibration data are not.
    """
    require_float64(sam.device)
    scheme = scheme if isinstance(scheme, Scheme) else Scheme.from_yaml(scheme)
    if isinstance(calibration, ImageSet):
        source = prompts if prompts is not None else GroundTruth(calibration)
        calibration = calibration_pictures(
            sam,
            calibration,
            source,
            scheme.calibrate,
            Prompting(),
            progress,
            order_seed(scheme, seed),
        )
    return quantize_sam(
        sam,
        calibration,
        scheme,
        quantize_encoder=quantize_encoder,
        seed=seed,
        progress=progress,
    )


@reproducible()
def evaluate(
    sam: Sam,
    dataset: ImageSet,
    prompts: PromptSource | str = "ground-truth",
    *,
    prompting: Prompting | None = None,
    reference: Sam | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """Score a float or quantized SAM.

    Args:
        sam: the model.
        dataset: pictures; without annotations only agreement is measured.
        prompts: where boxes come from, or its name on the command line.
        prompting: how boxes prompt and how masks are scored.
        reference: the float model, to measure agreement with.
        progress: shows how far it is.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR in percent; mean_iou with ground-truth prompts; agreement
        with a reference.
    """
    source = open_prompts(prompts, dataset) if isinstance(prompts, str) else prompts
    evaluation = evaluate_sam(
        sam,
        dataset,
        source,
        prompting or Prompting(),
        reference=reference,
        progress=progress,
    )
    return evaluation.metrics
