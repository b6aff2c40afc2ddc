"""From parsed command-line arguments to a run, and its outcome to the terminal."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptq4sam import parallel
from ptq4sam.columns import terminal_width
from ptq4sam.commands.flags import require_calibration_size
from ptq4sam.deploy.backends import TORCH, choose_backend
from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.progress import bars
from ptq4sam.quantization.scheme import PRESETS, Scheme
from ptq4sam.runs.configs.datasets import find_dataset
from ptq4sam.runs.nncf import NncfRequest
from ptq4sam.runs.run import Run
from ptq4sam.runs.settings import AccuracySettings, DataSettings, RunSettings
from ptq4sam.runs.summary import summary_table
from ptq4sam.sizes import parse_bytes


def settings_from_arguments(
    parsed: argparse.Namespace, backend: str | None = TORCH, **more: Any
) -> RunSettings:
    """The run that `ptq4sam evaluate` or `quantize` was asked for.

    Args:
        parsed: the arguments.
        backend: what runs the model; None for what fits the checkpoint.
        more: further fields of the settings.

    Raises:
        ConfigError: arguments do not belong together.
    """
    scheme = None
    if parsed.scheme is not None:
        scheme = with_preset(Scheme.from_yaml(parsed.scheme), parsed.preset)
        # After the preset: what was asked for by name goes before what comes along.
        scheme = scheme.with_overrides(*parsed.set)
        if parsed.calibration_size is not None:
            require_calibration_size(parsed.calibration_size)
            scheme = replace(scheme, calibrate=parsed.calibration_size)
    else:
        for given in ("set", "preset", "calibration_size", "decoder_only"):
            if getattr(parsed, given) not in (None, [], False):
                flag = given.replace("_", "-")
                raise ConfigError(f"--{flag} changes a scheme, but none was given: add --scheme")
    checkpoint, backend = choose_backend(parsed.checkpoint, backend)
    return RunSettings(
        model=parsed.model,
        data=data_pair("", parsed.images, parsed.annotations, parsed.recursive),
        prompts=parsed.prompts,
        work_dir=parsed.work_dir,
        checkpoint=checkpoint,
        float_checkpoint=parsed.float_checkpoint,
        scheme=scheme,
        quantize_encoder=not parsed.decoder_only,
        calibration=_calibration(parsed),
        calibration_prompts=parsed.calibration_prompts,
        prompting=prompting_of(parsed),
        limit=parsed.limit,
        skip_bad=parsed.skip_bad,
        device=parsed.device,
        seed=parsed.seed,
        backend=backend,
        **engine_settings(parsed),
        **more,
    )


def accuracy_settings(parsed: argparse.Namespace) -> AccuracySettings | None:
    """The accuracy control that `ptq4sam quantize` was asked for.

    Raises:
        ConfigError: values are impossible, or something is said about it without --max-drop.
    """
    given = {
        "metric": ("--drop-metric", parsed.drop_metric),
        "pictures": ("--drop-pictures", parsed.drop_pictures),
        "images": ("--validation-images", parsed.validation_images),
        "annotations": ("--validation-annotations", parsed.validation_annotations),
        "limit": ("--validation-limit", parsed.validation_limit),
    }
    named = {field: (flag, value) for field, (flag, value) in given.items() if value is not None}
    if parsed.max_drop is None:
        for flag, _ in named.values():
            raise ConfigError(f"{flag} is about accuracy control: add --max-drop POINTS")
        return None
    values = {field: value for field, (_, value) in named.items()}
    return AccuracySettings(max_drop=parsed.max_drop, **values)


def nncf_request(parsed: argparse.Namespace) -> NncfRequest:
    """The quantization by NNCF that `ptq4sam quantize --method nncf` was asked for.

    Raises:
        ConfigError: values are impossible, or arguments are about our own quantization.
    """
    for name in ("scheme", "set", "preset", "resume", "dry_run", "decoder_only"):
        if getattr(parsed, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is about PTQ4SAM: leave it away with --method nncf")
    calibration = _calibration(parsed)
    if calibration is None:
        raise ConfigError("NNCF needs pictures to calibrate on: give --calibration-images")
    size = {} if parsed.calibration_size is None else {"pictures": parsed.calibration_size}
    return NncfRequest(
        parsed.output,
        calibration,
        model=parsed.model,
        checkpoint=parsed.checkpoint,
        accuracy=accuracy_settings(parsed),
        prompting=prompting_of(parsed),
        skip_bad=parsed.skip_bad,
        **size,
    )


def prompting_of(parsed: argparse.Namespace) -> Prompting:
    """How boxes prompt, from arguments."""
    return Prompting(
        best_in_multi_mask=parsed.best_in_multi_mask,
        cascade=parsed.cascade,
        use_sam_iou=not parsed.no_sam_iou,
        keep_scores=parsed.keep_scores,
        max_per_image=parsed.max_per_image,
        score_threshold=parsed.score_threshold,
    )


def with_preset(scheme: Scheme, preset: str | None) -> Scheme:
    """The scheme with a preset's number of steps.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset is None:
        return scheme
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset} was asked for: use one of {', '.join(PRESETS)}")
    return scheme.with_steps(PRESETS[preset])


def engine_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The fields of a run that the engine's flags set.

    Raises:
        ConfigError: the memory budget is no size.
    """
    budget = parsed.memory_budget
    return {
        "memory_budget": None if budget is None else parse_bytes(budget),
        "resume": parsed.resume,
        "dry_run": parsed.dry_run,
    }


def _calibration(parsed: argparse.Namespace) -> DataSettings | None:
    return data_pair(
        "calibration-",
        parsed.calibration_images,
        parsed.calibration_annotations,
        parsed.recursive,
    )


def data_pair(
    prefix: str, images: Path | None, annotations: Path | None, recursive: bool = False
) -> DataSettings | None:
    """A data set with or without annotations, or None where nothing is given.

    Args:
        prefix: of the flags, as "calibration-".
        images: a folder; without annotations it may be what `find_dataset` takes too.
        annotations: COCO instances file.
        recursive: search subfolders too.

    Raises:
        ConfigError: annotations are given without pictures, or no data set has that name.
        DataError: an instances file has no pictures beside it.
    """
    if images is not None and annotations is None and _is_named(images):
        named = find_dataset(str(images), "calibration" if prefix == "calibration-" else "data")
        recursive = recursive or named.recursive
        return DataSettings(named.images, named.annotations, recursive, named.limit)
    if images is not None:
        return DataSettings(images, annotations, recursive)
    if annotations is not None:
        raise ConfigError(f"--{prefix}annotations is about pictures: add --{prefix}images")
    return None


def _is_named(images: Path) -> bool:
    """Whether it is a data set in one word, not a folder, be it there or not."""
    word = len(images.parts) == 1 and not images.suffix
    return not images.is_dir() and (word or images.name.endswith((".json", ".json.gz", ".py")))


def execute(settings: RunSettings) -> int:
    """Do the run with progress bars and print its summary, or the plan of a dry run.

    Of several processes that torchrun started the first one tells.
    """
    with parallel.joined():
        if not parallel.is_first():
            logging.getLogger("ptq4sam").setLevel(logging.WARNING)
            Run(settings).execute()
            return 0
        metrics = Run(settings, bars).execute()
    if settings.dry_run:
        sys.stdout.write("\n".join(metrics["plan"]) + "\n")
        return 0
    sys.stdout.write(summary_table(metrics, terminal_width()) + "\n")
    sys.stdout.write(f"written to {settings.work_dir / 'metrics.json'}\n")
    if (model := settings.save_model) is not None:
        sys.stdout.write(
            f"written to {model}; score it with ptq4sam evaluate --checkpoint {model}\n"
        )
    return 0
