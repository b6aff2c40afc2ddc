"""`ptq4sam distil`: train a SAM by another one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ptq4sam.commands.flags import (
    MODELS,
    add_decoder_only,
    add_device,
    add_images,
    add_set,
    add_skip_bad,
)

if TYPE_CHECKING:
    from ptq4sam.runs.distilling import DistillationRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam distil`."""
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="F.yaml",
        help="what is trained, and how; default: see docs/distillation.md",
    )
    parser.add_argument(
        "--student",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, perhaps with sizes of its own: vit_nano:embed_dim=80",
    )
    parser.add_argument(
        "--teacher", metavar="NAME", help="a SAM of the same prompts and embeddings"
    )
    parser.add_argument(
        "--init", type=Path, metavar="F", help="weights that the student begins with; else random"
    )
    parser.add_argument(
        "--teacher-checkpoint", type=Path, metavar="F", help="weights of the teacher"
    )
    parser.add_argument(
        "--scheme",
        type=Path,
        help="keep the quantizers of this scheme in the student while it learns; its teacher is "
        "the float model unless --teacher names another",
    )
    add_decoder_only(parser)
    add_set(parser, "override the settings, e.g. phases.0.steps=20000 sampling.scenes=0.1")
    add_images(parser, required=False)
    parser.add_argument(
        "--annotations", type=Path, metavar="A.json", help="COCO instances file with masks"
    )
    parser.add_argument(
        "--calibration-images",
        type=Path,
        metavar="D",
        help="pictures that ranges come from, with --scheme; default: the first photographs",
    )
    parser.add_argument(
        "--calibration-annotations", type=Path, metavar="B.json", help="their COCO instances file"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(),
        metavar="D",
        help="folder that paths in the settings are relative to; default: here",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="F.safetensors", help="the weights"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/distil"),
        help="log and journal are written here (work_dirs/distil)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a killed training")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="threads that prepare pictures (1); 0 for none; results do not depend on it",
    )
    add_skip_bad(parser)
    add_device(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status. Of several processes the first one tells."""
    import logging

    from ptq4sam import parallel
    from ptq4sam.progress import bars, silent
    from ptq4sam.runs.distilling import distil

    request = _request(parsed)
    with parallel.joined():
        first = parallel.is_first()
        if not first:
            logging.getLogger("ptq4sam").setLevel(logging.WARNING)
        distil(request, bars if first else silent)
    if first:
        sys.stdout.write(
            f"written to {parsed.output}; score it with ptq4sam evaluate --model "
            f"{request.settings.student} --checkpoint {parsed.output}; curves: ptq4sam report "
            f"{parsed.work_dir}\n"
        )
    return 0


def _request(parsed: argparse.Namespace) -> DistillationRequest:
    """What the flags ask for.

    Raises:
        ConfigError: settings are not usable, or pictures come without annotations.
    """
    import dataclasses

    from ptq4sam.commands.requests import data_pair
    from ptq4sam.distillation.settings import FINE_TUNING, DistillationSettings, Source
    from ptq4sam.errors import ConfigError
    from ptq4sam.quantization.scheme import Scheme
    from ptq4sam.runs.distilling import DistillationRequest

    scheme = None if parsed.scheme is None else Scheme.from_yaml(parsed.scheme)
    settings = DistillationSettings() if scheme is None else FINE_TUNING
    if parsed.settings is not None:
        settings = DistillationSettings.read(parsed.settings, settings)
    settings = settings.with_overrides(*parsed.set)
    sources = [source.below(parsed.data) for source in settings.data]
    pair = data_pair("", parsed.images, parsed.annotations)
    if pair is not None:
        if pair.annotations is None:
            raise ConfigError(
                f"masks are learned from annotated pictures, but {pair.images} came without: add "
                "--annotations"
            )
        if pair.limit is not None:
            raise ConfigError(
                f"{parsed.images} means its first {pair.limit} pictures, but a training shows all "
                "of a file: give --images and --annotations of those"
            )
        sources.append(Source(pair.images, pair.annotations))
    named = {"student": parsed.student, "teacher": parsed.teacher}
    if parsed.workers < 0:
        raise ConfigError(f"asked for {parsed.workers} workers: use 0 or more")
    return DistillationRequest(
        dataclasses.replace(
            settings,
            data=tuple(sources),
            **{key: name for key, name in named.items() if name is not None},
        ),
        parsed.output,
        parsed.work_dir,
        init=parsed.init,
        teacher_checkpoint=parsed.teacher_checkpoint,
        device=parsed.device,
        workers=parsed.workers,
        resume=parsed.resume,
        skip_bad=parsed.skip_bad,
        scheme=scheme,
        quantize_encoder=not parsed.decoder_only,
        calibration=data_pair(
            "calibration-", parsed.calibration_images, parsed.calibration_annotations
        ),
    )
