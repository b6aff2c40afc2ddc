"""Do one distillation: open models and pictures, train, leave a file of weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq4sam import parallel
from ptq4sam.deploy.storage import save
from ptq4sam.distillation.pictures import Photographs
from ptq4sam.distillation.quantized import (
    begin_quantized,
    finish_quantized,
    learn_scales,
    require_tunable,
)
from ptq4sam.distillation.settings import DistillationSettings
from ptq4sam.distillation.students import finished_state, new_student, require_pair
from ptq4sam.distillation.training import STATE, Training
from ptq4sam.distillation.views import Views
from ptq4sam.downloads import Missing
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families import variant_of
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.files import refusal_to_write, replacing
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.journal import Journal, model_fingerprint, run_fingerprint
from ptq4sam.numerics import description, reproducible
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import open_prompts
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.auditing import audit_model, require_passed
from ptq4sam.runs.calibration import calibration_pictures, order_seed
from ptq4sam.runs.needed import look_for_data, look_for_sam
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.run_log import ENDED
from ptq4sam.runs.settings import DataSettings, find_device
from ptq4sam.runs.work_dir import working_in
from ptq4sam.sam.model import Sam
from ptq4sam.version import __version__

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationRequest:
    """What `ptq4sam distil` was asked for.

    Attributes:
        settings: of the training, with paths of pictures as they are.
        output: the file of weights to write.
        work_dir: receives state, curves and log.
        init: weights that the student begins with; None for random ones.
        teacher_checkpoint: weights of the teacher; None for the embedded ones.
        device: as `find_device` takes it.
        workers: threads that make batches.
        resume: go on with a state in the work directory.
        skip_bad: skip damaged pictures and unusable annotations.
        scheme: the student's quantization; None for a float one.
        quantize_encoder: quantize its image encoder too.
        calibration: pictures that ranges come from; None for the first photographs.
    """

    settings: DistillationSettings
    output: Path
    work_dir: Path
    init: Path | None = None
    teacher_checkpoint: Path | None = None
    device: str | None = None
    workers: int = 1
    resume: bool = False
    skip_bad: bool = False
    scheme: Scheme | None = None
    quantize_encoder: bool = True
    calibration: DataSettings | None = None

    @property
    def calibrated_on(self) -> DataSettings:
        """Pictures that ranges come from.

        Raises:
            ConfigError: there are none.
        """
        if self.calibration is not None:
            return self.calibration
        if not self.settings.data:
            raise ConfigError(
                "a scheme needs pictures to calibrate on: give calibration pictures with "
                "annotations, or photographs with annotations to train on"
            )
        first = self.settings.data[0]
        return DataSettings(first.images, first.annotations)


@reproducible()
def distil(request: DistillationRequest, progress: Progress = silent) -> Path:
    """Train a student and write its weights; returns their file.

    Several processes (see `parallel`) do it together, and the first one writes.

    Raises:
        ConfigError: settings or models do not go together; said before anything is computed.
        CheckpointError: weights are not what they were taken for.
        DataError: pictures or annotations cannot be used.
        ResourceError: the disk is full; the last complete state stays.
    """
    _require_inputs(request)
    settings = request.settings
    device = parallel.local_device(find_device(request.device))
    student = _student(request, device)
    teacher = student if request.scheme is not None else None
    if settings.teacher is not None:
        teacher = load_sam(settings.teacher, request.teacher_checkpoint, device)
    if student is None:
        student = new_student(settings.student, teacher, settings.seed).to(device)
    if teacher is not None:
        require_pair(student, teacher)
        teacher.requires_grad_(False)
    with working_in(request.work_dir):
        if not request.resume:
            _require_nothing_lost(request.work_dir)
        if request.scheme is None:
            average = _train(request, student, teacher, progress)
            if parallel.is_first():
                with replacing(request.output) as temporary:
                    half = settings.float_weights == "float16"
                    save_file(finished_state(average, half), temporary)
        else:
            _fine_tune(request, request.scheme, student, teacher, progress)
        if parallel.is_first():
            (request.work_dir / STATE).unlink(missing_ok=True)
            shutil.rmtree(request.work_dir / JOURNAL, ignore_errors=True)
            _log.info("%s: %s", ENDED, request.output)
    return request.output


def _fine_tune(
    request: DistillationRequest,
    scheme: Scheme,
    sam: Sam,
    teacher: Sam | None,
    progress: Progress,
) -> None:
    """Train a quantized student, prove that it is one, and write it."""
    student = _quantized(request, scheme, sam, progress)
    replaced = learn_scales(student)
    # By these a quantized model is known as the float one's.
    frozen = student.description.origin
    student.load_state_dict(_train(request, student, teacher, progress, frozen))
    finish_quantized(student, replaced)
    if not parallel.is_first():
        return
    report = audit_model(student)
    for line in report.lines():
        _log.info("%s", line)
    require_passed(report, student)
    save(student, request.output)


def _quantized(
    request: DistillationRequest, scheme: Scheme, sam: Sam, progress: Progress
) -> QuantizedSam:
    """The student as learning begins; what the killed run had finished is in the journal.

    Raises:
        ConfigError: the journal is of other pictures, weights or another scheme.
    """
    data = request.calibrated_on
    dataset = data.open(skip_bad=request.skip_bad, masks=False, enough=scheme.calibrate)
    items = calibration_pictures(
        sam,
        dataset,
        open_prompts("ground-truth", dataset),
        scheme.calibrate,
        Prompting(),
        progress,
        order_seed(scheme, request.settings.seed),
    )
    seed, encoder = request.settings.seed, request.quantize_encoder
    journal = None
    if parallel.is_first():
        found = run_fingerprint(sam, items, scheme, quantize_encoder=encoder, seed=seed)
        journal = Journal(request.work_dir / JOURNAL, found, resume=request.resume)
    return begin_quantized(
        sam,
        scheme,
        items,
        quantize_encoder=encoder,
        seed=seed,
        progress=progress,
        journal=journal,
    )


def _train(
    request: DistillationRequest,
    student: Sam,
    teacher: Sam | None,
    progress: Progress,
    frozen: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Averaged weights of a student that was trained to the end."""
    settings = request.settings
    photographs = Photographs(settings.data, request.skip_bad) if settings.data else None
    shown = "generated scenes alone" if photographs is None else f"{len(photographs)} photographs"
    _log.info("learning from %s", shown)
    cells = student.mask_input_size[0]
    views = Views(photographs, settings.sampling, student.geometry, cells, settings.seed)
    training = Training(
        student,
        teacher,
        views,
        settings,
        request.work_dir,
        _fingerprint(request, student, teacher, photographs),
        frozen=frozen,
    )
    if request.resume and not training.resume():
        _log.info("nothing to resume in %s: training starts", request.work_dir)
    return training.run(request.workers, progress)


def _require_nothing_lost(folder: Path) -> None:
    """Refuse to begin where a training has not ended.

    Raises:
        ConfigError: there is a state that would be lost.
    """
    state = folder / STATE
    if state.exists():
        raise ConfigError(
            f"{state} is of a training that has not ended: resume to go on with it, delete "
            "it, or name another work directory"
        )


def _student(request: DistillationRequest, device: torch.device) -> Sam | None:
    """A student that begins with weights; None for one that begins at random.

    A float one learns with its batch normalisations where its file has them.
    """
    name = request.settings.student
    if request.init is None and request.scheme is None:
        return None
    if request.scheme is None and variant_of(name).unfolded is not None:
        try:
            return load_sam(name, request.init, device, folded=False)
        except CheckpointError:
            # They may be folded already; whatever else is wrong is said here.
            student = load_sam(name, request.init, device)
            _log.info("no batch normalisations in the weights: the student learns without")
            return student
    return load_sam(name, request.init, device)


def _require_inputs(request: DistillationRequest) -> None:
    """Look for everything that is read, and whether results can be written.

    Raises:
        MissingError: files are not there; one line names all of them.
        ConfigError: a folder cannot be written to, or the output is one.
    """
    settings, missing = request.settings, Missing()
    _require_together(request)
    look_for_sam(missing, settings.student, request.init)
    look_for_sam(missing, settings.teacher, request.teacher_checkpoint)
    for source in settings.data:
        missing.look_for("pictures", source.images)
        missing.look_for("annotations", source.annotations)
    if request.scheme is not None:
        require_tunable(request.scheme)
        look_for_data(missing, request.calibrated_on, "calibration ", request.scheme.calibrate)
    missing.report()
    if request.output.is_dir():
        raise ConfigError(f"asked to write file {request.output}, which is a folder: name a file")
    if request.output.suffix != ".safetensors":
        raise ConfigError(
            f"asked to write weights to {request.output}: name it *.safetensors, as what it is"
        )
    for folder in (request.work_dir, request.output.parent):
        refusal = refusal_to_write(folder)
        if refusal is not None:
            raise ConfigError(f"{folder}: {refusal}: name another folder for what is written")


def _require_together(request: DistillationRequest) -> None:
    """Refuse what would be ignored.

    Raises:
        ConfigError: something is said about a teacher or about quantizers that there are none of.
    """
    if request.teacher_checkpoint is not None and request.settings.teacher is None:
        raise ConfigError("weights of a teacher were given, but no teacher: name it too")
    if request.scheme is None and request.calibration is not None:
        raise ConfigError("calibration pictures are about quantizers: add a scheme, or leave them")
    if request.scheme is None and not request.quantize_encoder:
        raise ConfigError("a float image encoder is about quantizers: add a scheme")


def _fingerprint(
    request: DistillationRequest, student: Sam, teacher: Sam | None, shown: Photographs | None
) -> dict[str, str]:
    """Everything that the bits of a training depend on, by name."""
    scheme = request.scheme
    return {
        "settings": json.dumps(request.settings.to_dict(), sort_keys=True),
        "scheme": "none" if scheme is None else json.dumps(scheme.to_dict()),
        "student": model_fingerprint(student),
        "teacher": "none" if teacher is None else model_fingerprint(teacher),
        "data": "scenes" if shown is None else " ".join(shown.fingerprints),
        "processes": str(parallel.count()),
        "ptq4sam": __version__,
        "torch": torch.__version__,
        **description(student.device),
    }
