"""`ptq4sam sensitivity`: which quantizers harm the masks most, each alone and all but each."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ptq4sam.commands.flags import add_run_arguments

if TYPE_CHECKING:
    from ptq4sam.studies.sensitivity.report import Sensitivities


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ptq4sam sensitivity`."""
    add_run_arguments(parser, images_required=True)
    parser.add_argument(
        "--by",
        nargs="+",
        default=["unit"],
        metavar="GRAIN",
        help="what is switched together: model, network, block, unit (the default), layer (by its "
        "address), quantizer; "
        "several are possible",
    )
    parser.add_argument(
        "--roles",
        nargs="*",
        metavar="ROLE",
        help="split each by weights, activations, inputs, query, key, value, softmax, state, "
        "outputs; default: all of them; without a name: do not split",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[],
        metavar="PATH",
        help="these only, as 'image_encoder.*', '*.attn:softmax', 'mask_decoder.*' or, of layers, "
        "'any:stage3:all:depthwise'",
    )
    parser.add_argument(
        "--measure",
        type=int,
        default=10,
        metavar="N",
        help="measure the masks of the N worst (10); all have their errors measured",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="as published studies do: measure each alone on all --pictures, and nothing with all "
        "but it",
    )
    parser.add_argument(
        "--proxy-pictures", type=int, default=4, metavar="N", help="pictures for the errors (4)"
    )
    parser.add_argument(
        "--pictures", type=int, default=32, metavar="N", help="pictures for the N worst (32)"
    )
    parser.add_argument(
        "--metric",
        help="what orders the worst: mean_iou (default with ground-truth boxes), AP (default with "
        "other boxes) or agreement",
    )


def run(parsed: argparse.Namespace) -> int:
    """Study, write, and show the worst."""
    from ptq4sam import parallel
    from ptq4sam.commands.requests import settings_from_arguments
    from ptq4sam.progress import bars
    from ptq4sam.studies.sensitivity.run import StudySettings, planned_targets, study_model
    from ptq4sam.studies.sensitivity.targets import ROLES

    asked = StudySettings(
        # "stage" is what a network was called here before.
        grains=tuple("network" if grain == "stage" else grain for grain in parsed.by),
        roles=ROLES if parsed.roles is None else tuple(parsed.roles),
        patterns=tuple(parsed.targets),
        measure=parsed.measure,
        proxy_pictures=parsed.proxy_pictures,
        pictures=parsed.pictures,
        alone=parsed.alone,
        metric=parsed.metric,
        resume=parsed.resume,
    )
    # A file that is quantized already has no quantization to go on with, but a study.
    parsed.resume = parsed.resume and parsed.scheme is not None
    settings = settings_from_arguments(parsed)
    if settings.dry_run:
        targets = planned_targets(settings, asked)
        sys.stdout.write("".join(f"{target.name}\n" for target in targets))
        return 0
    with parallel.joined():
        found = study_model(settings, asked, bars)
        if parallel.is_first():
            _show(found)
            for name in ("sensitivity.json", "sensitivity.csv"):
                sys.stdout.write(f"written to {settings.work_dir / name}\n")
    return 0


def _show(found: Sensitivities) -> None:
    """The table on the terminal."""
    from ptq4sam.columns import aligned, terminal_width

    told = [f"{found.about['model']}: by {found.about['metric']}, worst first"]
    told += aligned(found.lines(), width=terminal_width())
    if found.hidden:
        told.append(f"{found.hidden} more targets are in the files")
    proxy = "; * on the few pictures of the proxy only" if found.quantized_on_proxy else ""
    told.append(f"dB: of the mask logits{proxy}")
    sys.stdout.write("\n".join(told) + "\n")
