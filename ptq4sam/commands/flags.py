"""Flags that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

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
    """The flags of a run: model, scheme, pictures, prompts, engine."""
    add_model(parser)
    parser.add_argument("--checkpoint", type=Path, help="float weights or a quantized model")
    parser.add_argument(
        "--float-checkpoint",
        type=Path,
        metavar="F",
        help="float weights that a quantized --checkpoint is compared with",
    )
    parser.add_argument(
        "--scheme",
        type=Path,
        help="quantize by this: ptq4sam-l44 or another name of exp/, or a file",
    )
    add_set(parser, "override the scheme, e.g. recon.iters=500", old="--scheme-options")
    add_decoder_only(parser)
    add_images(parser, required=images_required)
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="A.json",
        help="COCO instances file; without it masks and pictures are written, but not scored",
    )
    parser.add_argument(
        "--prompts",
        default="ground-truth",
        help=f"where boxes come from, default ground-truth: {SOURCES}",
    )
    parser.add_argument(
        "--calibration-images", type=Path, metavar="D", help="pictures that ranges come from"
    )
    parser.add_argument("--calibration-annotations", type=Path, metavar="B.json")
    parser.add_argument("--calibration-prompts", help="as --prompts, for calibration pictures")
    parser.add_argument(
        "--calibration-size",
        type=int,
        metavar="N",
        help="calibrate in the scheme: how many pictures",
    )
    add_limit(parser, "evaluate the first N pictures only")
    add_skip_bad(parser)
    add_recursive(parser)
    _add_prompting(parser)
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs"))
    add_engine_arguments(parser)


def _add_prompting(parser: argparse.ArgumentParser) -> None:
    """How boxes prompt, and which masks they get."""
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="use boxes from this score on",
    )
    parser.add_argument(
        "--max-per-image", type=int, default=100, metavar="N", help="use the best N boxes (100)"
    )
    parser.add_argument(
        "--best-in-multi-mask",
        action="store_true",
        help="take the best of SAM's three masks by its own prediction, not the single one",
    )
    parser.add_argument(
        "--cascade",
        action="store_true",
        help="prompt again with the box and the mask",
    )
    parser.add_argument("--no-sam-iou", action="store_true", help="score without predicted IoUs")
    parser.add_argument(
        "--keep-scores", action="store_true", help="masks have their boxes' scores as they are"
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
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


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flag of which SAM it is."""
    parser.add_argument(
        "--model",
        help=f"{', '.join(MODELS)}; default: a quantized file's own, else vit_nano",
    )


def add_decoder_only(parser: argparse.ArgumentParser) -> None:
    """The flag of which part is quantized."""
    parser.add_argument("--decoder-only", action="store_true", help="leave the image encoder float")


def add_limit(parser: argparse.ArgumentParser, told: str) -> None:
    """The flag of how many pictures there are, and what is told of it."""
    parser.add_argument("--limit", type=int, metavar="N", help=told)


def add_skip_bad(parser: argparse.ArgumentParser) -> None:
    """The flag of what becomes of damaged pictures."""
    parser.add_argument("--skip-bad", action="store_true", help="skip damaged pictures")


def add_recursive(parser: argparse.ArgumentParser) -> None:
    """The flag of which pictures a folder has."""
    parser.add_argument(
        "--recursive",
        action="store_true",
        help="search subfolders too, where no annotations name the pictures",
    )


def add_set(parser: argparse.ArgumentParser, told: str, old: str | None = None) -> None:
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


def add_images(parser: argparse.ArgumentParser, *, required: bool) -> None:
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


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag of where torch computes."""
    parser.add_argument("--device", help="cpu or cuda:0; default: CUDA where there is one")
