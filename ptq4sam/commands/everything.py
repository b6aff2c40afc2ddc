"""`ptq4sam everything`: find masks without prompts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptq4sam.commands.flags import (
    add_backend_arguments,
    add_device,
    add_limit,
    add_model,
    add_recursive,
    add_set,
    add_skip_bad,
)
from ptq4sam.errors import ConfigError

if TYPE_CHECKING:
    from ptq4sam.everything import EverythingSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam everything`."""
    parser.add_argument("--images", type=Path, required=True, help="a picture or a folder")
    add_model(parser)
    parser.add_argument("--checkpoint", type=Path, help="float weights or a quantized model")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for masks.json, a COCO instances file, and pictures",
    )
    add_set(
        parser,
        "segment-anything's settings, e.g. points_per_side=16 crop_n_layers=1; an unknown key "
        "lists them",
        old="--options",
    )
    parser.add_argument(
        "--hierarchical",
        action="store_true",
        help="ask a sparse grid of points first, then where no mask is confident (TinySAM); its "
        "settings are options too: hierarchical.high_score_thresh=7 hierarchical.batch=64",
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="of the decoder, as 512MiB")
    add_limit(parser, "the first N pictures only")
    add_skip_bad(parser)
    add_recursive(parser)
    add_device(parser)
    add_backend_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ptq4sam import parallel
    from ptq4sam.deploy.backends import check_backend, choose_backend
    from ptq4sam.downloads import Missing
    from ptq4sam.progress import bars
    from ptq4sam.runs.everything import open_pictures, segment_everything
    from ptq4sam.runs.models import open_model
    from ptq4sam.runs.needed import look_for_sam
    from ptq4sam.runs.settings import find_device
    from ptq4sam.sizes import parse_bytes

    # Before anything is loaded.
    _settings(parsed.set, parsed.hierarchical)
    checkpoint, backend = choose_backend(parsed.checkpoint, parsed.backend)
    check_backend(backend, parsed.precision)
    budget = None if parsed.memory_budget is None else parse_bytes(parsed.memory_budget)
    missing = Missing()
    missing.look_for("pictures", parsed.images)
    look_for_sam(missing, parsed.model, checkpoint)
    missing.report()
    with parallel.joined():
        dataset = open_pictures(
            parsed.images,
            skip_bad=parsed.skip_bad,
            limit=parsed.limit,
            recursive=parsed.recursive,
        )
        device = parallel.local_device(find_device(parsed.device))
        sam = open_model(parsed.model, checkpoint, device, backend, parsed.precision)
        settings = _settings(parsed.set, parsed.hierarchical, sam.name)
        found = segment_everything(
            sam, dataset, parsed.output, settings, memory_budget=budget, progress=bars
        )
        if parallel.is_first():
            sys.stdout.write(
                f"{found.masks} masks on {found.pictures} pictures, {found.seconds:.2f} s a "
                f"picture; written to {parsed.output}\n"
            )
            sys.stdout.write("\n".join(found.tally.lines(settings)) + "\n")
    return 0


def _settings(options: list[str], hierarchical: bool, model: str = "") -> EverythingSettings:
    """Settings of flags, else those that suit a model.

    Raises:
        ConfigError: an option is not one, or is one of a way that was not asked for.
    """
    from ptq4sam.everything import EverythingSettings, Hierarchical

    of_hierarchy = [option for option in options if option.startswith("hierarchical.")]
    if of_hierarchy and not hierarchical:
        raise ConfigError(f"option {of_hierarchy[0]} was given without --hierarchical: add it")
    chosen = EverythingSettings.suited_to(model)
    if hierarchical:
        chosen = replace(chosen, hierarchical=Hierarchical())
    return chosen.with_overrides(*options)
