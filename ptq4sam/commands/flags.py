"""Flags that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ptq4sam.errors import ConfigError

if TYPE_CHECKING:
    Flags: TypeAlias = argparse._ActionsContainer
    """A parser, or a group of flags in it."""

SOURCES = (
    "boxes.json, ground-truth[:all], clicks[:N], scene-detector, onnx:FILE, yolox:FILE.pth, "
    "hdetr:FILE, focalnet-dino:FILE, torchvision:NAME[:FILE], transformers:FOLDER or "
    "mmdet:CONFIG:FILE (docs/prompts.md)"
)
"""Where boxes come from."""

MODELS = (
    *("vit_nano", "vit_nano_bimodal", "tiny_vit_nano"),
    *("vit_b", "vit_l", "vit_h", "mobile_sam", "tinysam"),
    *(f"efficientvit_sam_{size}" for size in ("l0", "l1", "l2", "xl0", "xl1", "nano")),
)
"""SAMs by name, as `families.VARIANTS` has them, for help that does not wait for torch."""


def add_run_arguments(parser: argparse.ArgumentParser, images_required: bool) -> None:
    """The flags of a run, in groups: model and scheme, pictures, calibration, prompts, engine."""
    group = parser.add_argument_group("model and scheme")
    add_model(group)
    group.add_argument("--checkpoint", type=Path, help="float weights or a quantized model")
    group.add_argument(
        "--float-checkpoint",
        type=Path,
        metavar="F",
        help="float weights that a quantized --checkpoint is compared with",
    )
    group.add_argument(
        "--scheme",
        type=Path,
        help="quantize by this: ptq4sam-l44 or another name of exp/, or a file",
    )
    add_set(group, "override the scheme, e.g. recon.iters=500", old="--scheme-options")
    add_decoder_only(group)
    group = parser.add_argument_group("pictures to score on")
    add_images(group, required=images_required)
    group.add_argument(
        "--annotations",
        type=Path,
        metavar="A.json",
        help="COCO instances file; nothing is scored without it",
    )
    add_limit(group, "evaluate the first N pictures only")
    add_skip_bad(group)
    add_recursive(group)
    _add_calibration(parser.add_argument_group("calibration"))
    _add_prompting(parser.add_argument_group("prompts and masks"))
    group = parser.add_argument_group("run")
    add_device(group)
    add_seed(group)
    group.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs"),
        help="results and log are written here (work_dirs)",
    )
    add_engine_arguments(group)


def _add_calibration(group: Flags) -> None:
    """What ranges come from."""
    group.add_argument(
        "--calibration-images", type=Path, metavar="D", help="pictures, as --images has them"
    )
    group.add_argument(
        "--calibration-annotations", type=Path, metavar="B.json", help="their COCO instances file"
    )
    group.add_argument(
        "--calibration-prompts", metavar="PROMPTS", help="as --prompts, for calibration pictures"
    )
    group.add_argument(
        "--calibration-size", type=int, metavar="N", help="how many pictures; default: the scheme's"
    )


def _add_prompting(group: Flags) -> None:
    """What boxes there are, how they prompt, and which masks they get."""
    group.add_argument(
        "--prompts",
        default="ground-truth",
        help=f"where boxes come from, default ground-truth: {SOURCES}",
    )
    group.add_argument(
        "--score-threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="use boxes from this score on",
    )
    group.add_argument(
        "--max-per-image", type=int, default=100, metavar="N", help="use the best N boxes (100)"
    )
    group.add_argument(
        "--best-in-multi-mask",
        action="store_true",
        help="take the best of SAM's three masks by its own prediction, not the single one",
    )
    group.add_argument(
        "--cascade",
        action="store_true",
        help="prompt again with the box and the mask",
    )
    group.add_argument("--no-sam-iou", action="store_true", help="score without predicted IoUs")
    group.add_argument(
        "--keep-scores", action="store_true", help="masks have their boxes' scores as they are"
    )


def add_engine_arguments(parser: Flags) -> None:
    """The flags of the reconstruction engine, the same for every command that quantizes."""
    parser.add_argument(
        "--preset",
        help="steps a unit: quick (500), standard (5,000) or paper (20,000); default: the scheme's",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory for captured activations, as 8GiB; default: half of what is free",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a killed quantization")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose what runs an exported or quantized model."""
    parser.add_argument(
        "--backend",
        metavar="B",
        help="torch, the simulation; integer, its exact and slow reference, of a quantized "
        "--checkpoint; onnxruntime or openvino, of the folder --checkpoint that ptq4sam export "
        "wrote; auto: the fastest of those that can run the checkpoint; default: what runs such a "
        "folder, else torch",
    )
    parser.add_argument(
        "--precision",
        default="f32",
        metavar="P",
        help="of what is not integer under --backend openvino: f32 (the default) or, for a float "
        "model or one exported with --fast, bf16",
    )


def add_model(parser: Flags) -> None:
    """The flag of which SAM it is."""
    parser.add_argument(
        "--model",
        help=f"{', '.join(MODELS)}; default: a quantized file's own, else vit_nano",
    )


def add_decoder_only(parser: Flags) -> None:
    """The flag of which part is quantized."""
    parser.add_argument("--decoder-only", action="store_true", help="leave the image encoder float")


def add_limit(parser: Flags, told: str) -> None:
    """The flag of how many pictures there are, and what is told of it."""
    parser.add_argument("--limit", type=int, metavar="N", help=told)


def require_calibration_size(size: int | None) -> None:
    """Refuse a number of calibration pictures that is none.

    Raises:
        ConfigError: it is below 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"asked for --calibration-size {size}: use 1 or more")


def add_skip_bad(parser: Flags) -> None:
    """The flag of what becomes of damaged pictures."""
    parser.add_argument("--skip-bad", action="store_true", help="skip damaged pictures")


def add_recursive(parser: Flags) -> None:
    """The flag of which pictures a folder has."""
    parser.add_argument(
        "--recursive",
        action="store_true",
        help="search subfolders too, where no annotations name the pictures",
    )


def add_set(parser: Flags, told: str, old: str | None = None) -> None:
    """The flag that sets single values, and what is told of it.

    Args:
        parser: of the verb.
        told: about it.
        old: what it was called before.
    """
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=told
    )
    if old is not None:
        parser.add_argument(
            old, dest="set", nargs="+", action="extend", default=[], help=argparse.SUPPRESS
        )


def add_images(parser: Flags, *, required: bool) -> None:
    """The flag of which pictures."""
    parser.add_argument(
        "--images",
        type=Path,
        required=required,
        metavar="D",
        help="folder of pictures; or in one word pictures and annotations: coco or another name "
        "in projects/configs/_base_, a configuration .py, or a COCO instances .json with its "
        "pictures beside it",
    )


def add_device(parser: Flags) -> None:
    """The flag of where torch computes."""
    parser.add_argument("--device", help="cpu or cuda:0; default: CUDA where there is one")


def add_seed(parser: Flags) -> None:
    """The flag of what chance does."""
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (0)")
