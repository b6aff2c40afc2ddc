"""What one run is asked to do, complete and validated, whichever command line asked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ptq4sam.data import CocoDataset, ImageFolder, ImageSet
from ptq4sam.data.images import check_limit
from ptq4sam.deploy.backends import check_backend
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.numerics import require_float64
from ptq4sam.quantization.scheme import SIMULATIONS, Scheme
from ptq4sam.records import Record

DEFAULT_MODEL = "vit_nano"
"""The SAM whose weights ship with the package."""


@dataclass(frozen=True)
class DataSettings:
    """A data set on disk.

    Attributes:
        images: folder of pictures.
        annotations: COCO instances file, or None.
        recursive: search subfolders too, where there are no annotations to name the pictures.
        limit: of its own: use the first ones only, where nothing else is asked for.
    """

    images: Path
    annotations: Path | None = None
    recursive: bool = False
    limit: int | None = None

    def open(
        self,
        *,
        skip_bad: bool = False,
        limit: int | None = None,
        masks: bool = True,
        enough: int | None = None,
    ) -> ImageSet:
        """The data set; arguments and errors are those of `CocoDataset` and `ImageFolder`."""
        limit = self.limit if limit is None else limit
        if self.annotations is None:
            return ImageFolder(self.images, skip_bad, limit, self.recursive)
        return CocoDataset(self.images, self.annotations, skip_bad, limit, masks, enough)


Metric = Literal["mean_iou", "AP"]
"""What accuracy control looks at: of annotated boxes the mean IoU, of the prompts the AP."""


@dataclass(frozen=True)
class AccuracySettings(Record):
    """How much a quantized model may lose, and where that is measured.

    Attributes:
        max_drop: percentage points of the metric that it may be below the float model.
        metric: "mean_iou" or "AP".
        pictures: pictures that single units are measured on; whole models are on all.
        images: folder of validation pictures; None for those that are evaluated.
        annotations: their COCO instances file.
        limit: measure on the first pictures only.
    """

    max_drop: float
    metric: Metric = "mean_iou"
    pictures: int = 32
    images: Path | None = None
    annotations: Path | None = None
    limit: int | None = None

    def _validate(self) -> None:
        check_limit(self.limit)
        self._require(self.max_drop >= 0, "max_drop", "0 or more")
        self._require(self.pictures >= 1, "pictures", "1 or more")
        if (self.images is None) != (self.annotations is None):
            raise ConfigError(
                "accuracy is measured on annotated pictures: give validation pictures "
                "and their annotations together"
            )


@dataclass(frozen=True)
class RunSettings:
    """One run.

    Attributes:
        model: name of the SAM; None for that of a quantized `checkpoint`, else vit_nano.
        data: what is evaluated; None where a run only quantizes.
        prompts: a prompt source as the command line names it (see `open_prompts`).
        work_dir: receives metrics.json, run.log and the scheme as used.
        checkpoint: float weights or a quantized model; None for the embedded weights.
        float_checkpoint: float weights that `checkpoint`, a quantized model, was made of, to
            measure its agreement with; None for the embedded weights where they are those.
        scheme: the quantization; None evaluates the model as it is.
        quantize_encoder: quantize the image encoder too, not only the mask decoder.
        calibration: pictures to calibrate on; needed with a scheme, meaningless without.
        calibration_prompts: prompt source of the calibration pictures; None for `prompts`, or for
            ground truth where `prompts` is a file of boxes (which knows other pictures only).
        prompting: how boxes prompt and how masks are scored.
        limit: evaluate the first pictures only.
        skip_bad: skip damaged pictures and annotations instead of stopping.
        device: torch device; None for CUDA where there is one.
        seed: fixes every random choice.
        cache_dir: where detections are kept between runs; None for the places of `CacheFolders`.
        show_dir: where pictures with masks are written; None for nowhere, or for a folder in
            `work_dir` where the data have no annotations: looking is the only score then.
        show_threshold: lowest score of a mask that is drawn.
        results: where the masks are written as COCO results; None as for `show_dir`.
        score: whether metrics are computed; without, only `results` are written.
        save_model: where the quantized model is written; None for nowhere.
        accuracy: return units to more bits until the model is as good as this; None takes it as
            it is.
        memory_budget: bytes of memory for captured activations, on the device that computes; None
            for half of what is free.
        resume: go on with what a killed run of the same settings has finished in `work_dir`.
        dry_run: plan the quantization and stop.
        backend: what runs the model: "torch", the simulation; "integer", a quantized
            `checkpoint` summed in integers; "onnxruntime" or "openvino", an exported one;
            "auto", the fastest of those.
        precision: under "openvino", of what is not integer: "f32" or "bf16".

    Raises:
        ConfigError: a value is impossible, or values do not belong together.
    """

    model: str | None
    data: DataSettings | None
    prompts: str
    work_dir: Path
    checkpoint: Path | None = None
    float_checkpoint: Path | None = None
    scheme: Scheme | None = None
    quantize_encoder: bool = True
    calibration: DataSettings | None = None
    calibration_prompts: str | None = None
    prompting: Prompting = field(default_factory=Prompting)
    limit: int | None = None
    skip_bad: bool = False
    device: str | None = None
    seed: int = 0
    cache_dir: Path | None = None
    show_dir: Path | None = None
    show_threshold: float = 0.3
    results: Path | None = None
    score: bool = True
    save_model: Path | None = None
    accuracy: AccuracySettings | None = None
    memory_budget: int | None = None
    resume: bool = False
    dry_run: bool = False
    backend: str = "torch"
    precision: str = "f32"

    def __post_init__(self) -> None:
        check_limit(self.limit)
        check_backend(self.backend, self.precision)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"asked for seed {self.seed}: use 0 to {2**32 - 1}")
        if self.scheme is not None and self.calibration is None:
            raise ConfigError(
                "a scheme needs pictures to calibrate on: give calibration pictures and "
                "their annotations"
            )
        if self.scheme is None and (self.resume or self.dry_run):
            raise ConfigError(
                "to resume and to plan are about quantization, but nothing is to be quantized: "
                "add a scheme"
            )
        if self.backend != "torch" and (self.checkpoint is None or self.scheme is not None):
            raise ConfigError(
                f"backend {self.backend} runs what is quantized or exported already: give it as "
                "the checkpoint, without a scheme"
            )
        if self.prompts.partition(":")[0] == "clicks" and (
            self.prompting.cascade or self.prompting.best_in_multi_mask
        ):
            raise ConfigError(
                "a cascade and the best of three masks are about boxes, but prompts are clicks: "
                "leave them away"
            )
        self._check_accuracy()
        self._check_saving()

    def _check_accuracy(self) -> None:
        if self.accuracy is None:
            return
        if self.scheme is None:
            raise ConfigError(
                "accuracy control is about quantization, but nothing is to be quantized: add a "
                "scheme"
            )
        if self.scheme.compat == "published":
            raise ConfigError(
                "accuracy control cannot mend a model with compat: published, which is random: use "
                "compat: faithful"
            )
        evaluated = self.data is not None and self.data.annotations is not None
        if self.accuracy.images is None and not evaluated:
            raise ConfigError(
                "accuracy is measured on annotated pictures: give validation pictures and their "
                "annotations, or evaluate annotated ones"
            )

    def _check_saving(self) -> None:
        if self.save_model is None:
            return
        if self.save_model.suffix != ".safetensors":
            raise ConfigError(
                f"asked to write the model to {self.save_model}: name it *.safetensors, which is "
                "what it is"
            )
        compat = "faithful" if self.scheme is None else self.scheme.compat
        if why := SIMULATIONS.get(compat):
            raise ConfigError(
                f"asked to save a model with compat: {compat}, which {why}: quantize with compat: "
                "faithful to get a file"
            )

    @property
    def float_model(self) -> str:
        """Name of the float SAM."""
        return self.model or DEFAULT_MODEL

    def torch_device(self) -> torch.device:
        """The device that the run uses; errors as `find_device`."""
        return find_device(self.device)


def find_device(name: str | None) -> torch.device:
    """The device of a name; None for CUDA where there is one.

    Raises:
        ConfigError: the name is no device, there is no such device here, or it lacks float64.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"asked for device {name!r}, which torch does not know: use cpu or cuda:0"
        ) from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"asked for device {name!r}, which is not there: found {_devices()}"
        ) from error
    require_float64(device)
    return device


def _devices() -> str:
    return ", ".join(["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))])
