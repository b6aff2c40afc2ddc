"""The `ptq4sam` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ptq4sam.errors import ConfigError, Ptq4samError, is_out_of_memory
from ptq4sam.experiments.cost import add_arguments as add_cost_arguments
from ptq4sam.experiments.report.command import add_arguments as add_report_arguments
from ptq4sam.experiments.sweep.command import add_arguments as add_sweep_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for an error the user can mend)."""
    parsed = build_parser().parse_args(arguments)
    return guarded(lambda: parsed.run(parsed), verbose=parsed.verbose)


def guarded(action: Callable[[], int], verbose: bool = False) -> int:
    """Run an action with the log on stderr and named errors as one line."""
    from rich.console import Console
    from rich.logging import RichHandler

    from ptq4sam.allocator import keep_freed_memory

    keep_freed_memory()
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    logger = logging.getLogger("ptq4sam")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        return action()
    except Ptq4samError as error:
        return _refuse(str(error))
    except OSError as error:
        # A full disk, no permission: the user's to mend, wherever it happens.
        logger.debug("where it happened", exc_info=True)
        what = error.strerror or str(error) or type(error).__name__
        return _refuse(what if error.filename is None else f"{error.filename}: {what}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.debug("where it happened", exc_info=True)
        what = str(error)[:120] or "in Python"
        return _refuse(
            f"out of memory ({what}): lower --memory-budget, or calibrate on fewer pictures "
            "(calibrate in the scheme); finished units are kept, go on with --resume"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    finally:
        logger.removeHandler(handler)


def _refuse(problem: str) -> int:
    sys.stderr.write(f"error: {' '.join(problem.split())}\n")
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line with all its verbs."""
    parser = argparse.ArgumentParser(prog="ptq4sam", description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="log details")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    evaluate = verbs.add_parser("evaluate", help="score a SAM, float or quantized, on a data set")
    _add_run_arguments(evaluate, images_required=True)
    evaluate.add_argument("--show-dir", type=Path, help="write pictures with masks here")
    evaluate.add_argument("--show-score-thr", type=float, default=0.3, metavar="T")
    evaluate.add_argument("--out", type=Path, help="write the masks as COCO results JSON")
    _add_backend_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)

    quantize = verbs.add_parser("quantize", help="quantize a SAM and write it to a file")
    _add_run_arguments(quantize, images_required=False)
    quantize.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="F",
        help="F.safetensors, or with --method nncf a folder",
    )
    quantize.add_argument(
        "--method",
        choices=("ptq4sam", "nncf"),
        default="ptq4sam",
        help="nncf: export for OpenVINO with an image encoder that NNCF quantized to INT8, to "
        "compare with",
    )
    quantize.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="return units to 8 bits or float until the model is at most so many points below the "
        "float one",
    )
    quantize.add_argument("--drop-metric", choices=("mean_iou", "AP"), help="default: mean_iou")
    quantize.add_argument(
        "--drop-pictures", type=int, metavar="N", help="pictures that single units are measured on"
    )
    quantize.add_argument(
        "--validation-images", type=Path, help="pictures for --max-drop; default: --images"
    )
    quantize.add_argument("--validation-annotations", type=Path, metavar="C.json")
    quantize.add_argument("--validation-limit", type=int, metavar="N")
    quantize.set_defaults(run=_quantize)

    export = verbs.add_parser("export", help="write a SAM for ONNX Runtime or OpenVINO")
    export.add_argument(
        "model", help="file written by ptq4sam quantize, or vit_nano, vit_b, ... for a float SAM"
    )
    export.add_argument("--checkpoint", type=Path, help="float weights of a model given by name")
    export.add_argument("--format", required=True, metavar="F", help="onnx or openvino")
    export.add_argument("--output", type=Path, required=True, metavar="DIR")
    export.set_defaults(run=_export)

    prompts = verbs.add_parser("prompts", help="write a detector's boxes as COCO results")
    prompts.add_argument(
        "--detector", required=True, help="as --prompts of evaluate: onnx:FILE, ..."
    )
    prompts.add_argument(
        "--dataset",
        metavar="D",
        help="coco or another name in projects/configs/_base_, a configuration .py, a COCO "
        "instances .json with its pictures beside it, or a folder of pictures",
    )
    prompts.add_argument("--images", type=Path, help="instead of --dataset: folder of pictures")
    prompts.add_argument("--annotations", type=Path, metavar="A.json", help="COCO instances file")
    prompts.add_argument("--out", type=Path, required=True, metavar="BOXES.json")
    prompts.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    prompts.add_argument("--skip-bad", action="store_true", help="skip damaged pictures")
    prompts.add_argument("--device", help="cpu or cuda:0; default: cpu")
    prompts.set_defaults(run=_prompts)

    everything = verbs.add_parser("everything", help="find masks without prompts")
    everything.add_argument("--images", type=Path, required=True, help="a picture or a folder")
    everything.add_argument("--model", help="as for evaluate")
    everything.add_argument("--checkpoint", type=Path, help="float weights or a quantized model")
    everything.add_argument("--out", type=Path, required=True, metavar="DIR")
    everything.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="segment-anything's settings, e.g. points_per_side=16 crop_n_layers=1; an unknown key "
        "lists them",
    )
    everything.add_argument("--memory-budget", metavar="SIZE", help="of the decoder, as 512MiB")
    everything.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    everything.add_argument("--skip-bad", action="store_true", help="skip damaged pictures")
    everything.add_argument("--device", help="cpu or cuda:0; default: CUDA where there is one")
    _add_backend_arguments(everything)
    everything.set_defaults(run=_everything)

    audit = verbs.add_parser("audit", help="prove that a quantized model is one")
    audit.add_argument("model", type=Path, help="file written by ptq4sam quantize")
    audit.set_defaults(run=_audit)

    verify = verbs.add_parser(
        "verify", help="compare a quantized model with its integer form, operator by operator"
    )
    verify.add_argument("model", type=Path, help="file written by ptq4sam quantize")
    verify.add_argument("--images", type=Path, help="folder of pictures; default: generated scenes")
    verify.add_argument("--limit", type=int, default=4, metavar="N", help="pictures to use (4)")
    verify.add_argument("--device", default="cpu", help="cpu or cuda:0; default: cpu")
    verify.set_defaults(run=_verify)

    size = verbs.add_parser("size", help="what takes the bytes of a quantized model, by part")
    size.add_argument("model", type=Path, help="file written by ptq4sam quantize")
    size.set_defaults(run=_size)

    scenes = verbs.add_parser("scenes", help="write generated scenes as a COCO-format data set")
    scenes.add_argument("folder", type=Path)
    scenes.add_argument("--train", type=int, default=32, metavar="N")
    scenes.add_argument("--val", type=int, default=100, metavar="N")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=_scenes)

    demo = verbs.add_parser("demo", help="the whole job on the embedded model and scenes")
    demo.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"))
    demo.set_defaults(run=_demo)

    download = verbs.add_parser("download", help="get published weights and data by name")
    download.add_argument("names", nargs="*", metavar="NAME")
    download.add_argument("--list", action="store_true", help="what there is, and what is here")
    download.add_argument(
        "--root", type=Path, default=Path(), help="folder of ckpt/ and data/; default: here"
    )
    download.set_defaults(run=_download)

    add_cost_arguments(verbs.add_parser("cost", help="operations and bytes of a SAM, by part"))
    add_sweep_arguments(verbs.add_parser("sweep", help="a grid of trials from a file, resumable"))
    add_report_arguments(verbs.add_parser("report", help="a run or a sweep as one HTML file"))
    return parser


def _add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="torch",
        metavar="B",
        help="torch (the default), the simulation; torch-int8, fast integer products of a "
        "quantized --checkpoint, or integer, their exact and slow reference; onnxruntime or "
        "openvino, of the folder --checkpoint that ptq4sam export wrote; auto: "
        "the fastest of those that can run the checkpoint",
    )
    parser.add_argument(
        "--precision",
        default="f32",
        metavar="P",
        help="of what is not integer under --backend openvino: f32 (the default) or bf16",
    )


def _add_run_arguments(parser: argparse.ArgumentParser, images_required: bool) -> None:
    parser.add_argument(
        "--model",
        help="vit_nano, vit_b, vit_l or vit_h; default: a quantized file's own, else vit_nano",
    )
    parser.add_argument("--checkpoint", type=Path, help="float weights or a quantized model")
    parser.add_argument(
        "--float-checkpoint",
        type=Path,
        metavar="F",
        help="float weights that a quantized --checkpoint is compared with",
    )
    parser.add_argument("--scheme", type=Path, help="quantize by this file, e.g. exp/config44.yaml")
    parser.add_argument(
        "--scheme-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override the scheme, e.g. recon.iters=500",
    )
    parser.add_argument("--decoder-only", action="store_true", help="leave the image encoder float")
    parser.add_argument("--images", type=Path, required=images_required, help="folder of pictures")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="A.json",
        help="COCO instances file; without it masks and pictures are written, but not scored",
    )
    parser.add_argument(
        "--prompts",
        default="ground-truth",
        help="boxes.json, ground-truth (the default), scene-detector, onnx:FILE, yolox:FILE.pth, "
        "hdetr:FILE, focalnet-dino:FILE, torchvision:NAME[:FILE], transformers:FOLDER or "
        "mmdet:CONFIG:FILE",
    )
    parser.add_argument("--calibration-images", type=Path, help="pictures that ranges come from")
    parser.add_argument("--calibration-annotations", type=Path, metavar="B.json")
    parser.add_argument("--calibration-prompts", help="as --prompts, for calibration pictures")
    parser.add_argument(
        "--calibration-size",
        type=int,
        metavar="N",
        help="calibrate in the scheme: how many pictures",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N pictures only")
    parser.add_argument("--skip-bad", action="store_true", help="skip damaged pictures")
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
    parser.add_argument("--device", help="cpu or cuda:0; default: CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs"))
    add_engine_arguments(parser)


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


def _evaluate(parsed: argparse.Namespace) -> int:
    from ptq4sam.experiments.requests import execute, settings_from_arguments

    settings = settings_from_arguments(
        parsed,
        show_dir=parsed.show_dir,
        show_threshold=parsed.show_score_thr,
        results=parsed.out,
        backend=parsed.backend,
        precision=parsed.precision,
    )
    return execute(settings)


def _quantize(parsed: argparse.Namespace) -> int:
    from ptq4sam.experiments.requests import (
        accuracy_settings,
        execute,
        settings_from_arguments,
    )

    if parsed.method == "nncf":
        return _quantize_by_nncf(parsed)
    if parsed.scheme is None:
        raise ConfigError("ptq4sam quantize needs a scheme: give --scheme exp/config44.yaml")
    return execute(
        settings_from_arguments(
            parsed, save_model=parsed.output, accuracy=accuracy_settings(parsed)
        )
    )


def _export(parsed: argparse.Namespace) -> int:
    from ptq4sam.deploy.container import is_quantized_file
    from ptq4sam.deploy.export import export
    from ptq4sam.deploy.storage import load
    from ptq4sam.sam.checkpoint import load_sam
    from ptq4sam.sam.model import Sam
    from ptq4sam.sizes import format_bytes

    if is_quantized_file(parsed.model):
        if parsed.checkpoint is not None:
            raise ConfigError(f"{parsed.model} has its weights: leave --checkpoint away")
        sam: Sam = load(parsed.model)
    elif parsed.model.endswith(".safetensors"):
        raise ConfigError(
            f"{parsed.model} is no quantized model: name a float one (vit_b) and give its weights "
            "by --checkpoint"
        )
    else:
        sam = load_sam(parsed.model, parsed.checkpoint)
    manifest = export(sam, parsed.output, parsed.format)
    for name in manifest.files:
        path = parsed.output / name
        sys.stdout.write(f"{path} {format_bytes(path.stat().st_size)}\n")
    return 0


def _quantize_by_nncf(parsed: argparse.Namespace) -> int:
    from ptq4sam.experiments.nncf import quantize_by_nncf
    from ptq4sam.experiments.requests import nncf_request

    quantize_by_nncf(nncf_request(parsed))
    sys.stdout.write(
        f"written to {parsed.output}; score it with ptq4sam evaluate --backend openvino "
        f"--checkpoint {parsed.output}\n"
    )
    return 0


def _prompts(parsed: argparse.Namespace) -> int:
    from ptq4sam import parallel
    from ptq4sam.experiments.detecting import detect
    from ptq4sam.experiments.settings import DataSettings
    from ptq4sam.progress import bars
    from ptq4sam.solver.datasets import find_dataset

    limit = parsed.limit
    if parsed.dataset is not None:
        if parsed.images is not None or parsed.annotations is not None:
            raise ConfigError(
                "--dataset names pictures and annotations: leave --images and --annotations away"
            )
        named = find_dataset(parsed.dataset)
        data, limit = DataSettings(named.images, named.annotations), limit or named.limit
    elif parsed.images is not None:
        data = DataSettings(parsed.images, parsed.annotations)
    else:
        raise ConfigError("ptq4sam prompts needs pictures: give --dataset or --images")
    with parallel.joined():
        found = detect(
            parsed.detector,
            data,
            parsed.out,
            device=parsed.device,
            limit=limit,
            skip_bad=parsed.skip_bad,
            progress=bars,
        )
        if parallel.is_first():
            sys.stdout.write(f"{found} boxes written to {parsed.out}\n")
    return 0


def _everything(parsed: argparse.Namespace) -> int:
    from ptq4sam import parallel
    from ptq4sam.everything import EverythingSettings
    from ptq4sam.experiments.everything import open_model, open_pictures, segment_everything
    from ptq4sam.experiments.settings import find_device
    from ptq4sam.progress import bars
    from ptq4sam.sizes import parse_bytes

    settings = EverythingSettings().with_overrides(*parsed.options)
    budget = None if parsed.memory_budget is None else parse_bytes(parsed.memory_budget)
    with parallel.joined():
        dataset = open_pictures(parsed.images, skip_bad=parsed.skip_bad, limit=parsed.limit)
        device = parallel.local_device(find_device(parsed.device))
        sam = open_model(parsed.model, parsed.checkpoint, device, parsed.backend, parsed.precision)
        found = segment_everything(
            sam, dataset, parsed.out, settings, memory_budget=budget, progress=bars
        )
        if parallel.is_first():
            sys.stdout.write(
                f"{found.masks} masks on {found.pictures} pictures, {found.seconds:.2f} s a "
                f"picture; written to {parsed.out}\n"
            )
    return 0


def _audit(parsed: argparse.Namespace) -> int:
    from ptq4sam.deploy.storage import load
    from ptq4sam.experiments.run import audit_model

    report = audit_model(load(parsed.model))
    sys.stdout.write("\n".join(report.lines()) + "\n")
    return 0 if report.passed else 1


def _verify(parsed: argparse.Namespace) -> int:
    from ptq4sam.data.images import check_limit
    from ptq4sam.deploy.storage import load
    from ptq4sam.experiments.verifying import generated_subjects, pictured_subjects, verify_model
    from ptq4sam.progress import bars

    check_limit(parsed.limit)
    model = load(parsed.model, parsed.device)
    subjects = (
        generated_subjects(parsed.limit)
        if parsed.images is None
        else pictured_subjects(parsed.images, parsed.limit)
    )
    verification = verify_model(model, subjects, bars)
    sys.stdout.write("\n".join(verification.lines()) + "\n")
    return 0 if verification.passed else 1


def _size(parsed: argparse.Namespace) -> int:
    from ptq4sam.deploy.size_report import size_report

    sys.stdout.write("\n".join(size_report(parsed.model).lines()) + "\n")
    return 0


def _scenes(parsed: argparse.Namespace) -> int:
    from ptq4sam.data.scenes import write_scenes

    for offset, (name, count) in enumerate((("train", parsed.train), ("val", parsed.val))):
        write_scenes(parsed.folder, count, 2 * parsed.seed + offset, name)
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from ptq4sam.experiments.demo import run_demo

    return run_demo(parsed.work_dir)


def _download(parsed: argparse.Namespace) -> int:
    from ptq4sam.downloads.terminal import download, listing

    if parsed.list:
        sys.stdout.write("\n".join(listing(parsed.root)) + "\n")
        return 0
    if not parsed.names:
        raise ConfigError("ptq4sam download needs names: ptq4sam download --list shows them")
    download(parsed.names, parsed.root)
    return 0
