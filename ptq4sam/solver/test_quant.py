"""The published command: test a detector-prompted SAM, quantized or not, from a configuration.

python ptq4sam/solver/test_quant.py --config projects/configs/yolox/yolo_l-sam-vit-b.py \
        --q_config exp/config66.yaml --quant-encoder
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first on the path of a script, where a module of ours could
    # be taken for another package's; the package's own parent belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ptq4sam.commands.flags import add_engine_arguments, add_skip_bad
from ptq4sam.commands.requests import engine_settings, execute, with_preset
from ptq4sam.deploy.container import is_quantized_file
from ptq4sam.errors import ConfigError
from ptq4sam.parallel import started_by_torchrun
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.configs.experiment import DataConfig, ExperimentConfig
from ptq4sam.runs.settings import DataSettings, RunSettings
from ptq4sam.terminal import guarded

_log = logging.getLogger("ptq4sam.solver")

_WITHOUT_MEANING = {
    "tmpdir": "processes gather their results in memory",
    "gpu_collect": "processes gather their results in memory",
    "fuse_conv_bn": "batch normalisations are folded when weights are read",
    "short4cut": "it was a shortcut for debugging",
    "resign_end": "signs are folded once, before calibration",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    return guarded(lambda: execute(settings_from(parsed)))


def build_parser() -> argparse.ArgumentParser:
    """The published flags."""
    parser = argparse.ArgumentParser(description="Test a detector-prompted SAM, quantized or not.")
    parser.add_argument("--config", type=Path, required=True, help="experiment configuration")
    parser.add_argument("--q_config", type=Path, help="quantization scheme, exp/*.yaml")
    parser.add_argument("--quant-encoder", action="store_true", help="quantize the image encoder")
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/<name of --config>")
    parser.add_argument("--out", type=Path, help="write the masks as COCO results JSON")
    parser.add_argument("--eval", nargs="+", metavar="METRIC", help="segm (always computed)")
    parser.add_argument("--format-only", action="store_true", help="write --out, compute no score")
    parser.add_argument("--show", action="store_true", help="write pictures to <work-dir>/show")
    parser.add_argument("--show-dir", type=Path, help="write pictures with masks here")
    parser.add_argument("--show-score-thr", type=float, default=0.3)
    parser.add_argument("--fp", action="store_true", help="evaluate the float model")
    parser.add_argument("--save_sam_path", type=Path, help="write the quantized model here")
    parser.add_argument("--load_sam_path", type=Path, help="read a quantized model from here")
    parser.add_argument("--brecq", action="store_true", help="reconstruct weights only")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--options", nargs="+", default=[], help="old name of --eval-options")
    parser.add_argument("--eval-options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gpu-id", type=int, help="CUDA device; default: the first, or the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", help="boxes of any detector instead of the configured one")
    parser.add_argument("--device", help="torch device, e.g. cpu; goes before --gpu-id")
    add_skip_bad(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="pytorch: torchrun started several processes (which is seen without it)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tmpdir")
    parser.add_argument("--gpu-collect", action="store_true")
    parser.add_argument("--fuse-conv-bn", action="store_true")
    parser.add_argument("--short4cut", action="store_true")
    parser.add_argument("--resign_end", action="store_true")
    add_engine_arguments(parser)
    return parser


def settings_from(parsed: argparse.Namespace) -> RunSettings:
    """The run that the flags and the configuration describe.

    Raises:
        ConfigError: flags contradict each other, or the configuration is not usable.
    """
    _mention_flags_without_meaning(parsed)
    _check_launcher(parsed.launcher)
    config = ExperimentConfig.from_file(parsed.config, *parsed.cfg_options)
    scheme = _scheme(parsed)
    _check_paths(parsed)
    float_weights = config.sam.checkpoint
    work_dir = parsed.work_dir or Path("work_dirs") / parsed.config.stem
    settings = RunSettings(
        model=config.sam.type,
        checkpoint=parsed.load_sam_path or float_weights,
        float_checkpoint=float_weights
        if parsed.load_sam_path and float_weights and float_weights.exists()
        else None,
        data=_data(config.data),
        calibration=_data(config.calibration) if config.calibration else None,
        prompts=parsed.prompts or config.detector.prompts,
        work_dir=work_dir,
        scheme=scheme,
        quantize_encoder=parsed.quant_encoder,
        prompting=config.prompting,
        limit=config.data.limit,
        skip_bad=parsed.skip_bad,
        device=parsed.device or (None if parsed.gpu_id is None else f"cuda:{parsed.gpu_id}"),
        seed=parsed.seed,
        show_dir=parsed.show_dir or (work_dir / "show" if parsed.show else None),
        show_threshold=parsed.show_score_thr,
        results=parsed.out,
        score=not parsed.format_only,
        save_model=parsed.save_sam_path,
        **engine_settings(parsed),
    )
    return _eval_options(settings, [*parsed.options, *parsed.eval_options])


def _scheme(parsed: argparse.Namespace) -> Scheme | None:
    if parsed.load_sam_path is not None or parsed.fp:
        if parsed.q_config is not None:
            _log.warning("--q_config has no meaning with --fp or --load_sam_path")
        return None
    if parsed.q_config is None:
        raise ConfigError("name a scheme with --q_config exp/config66.yaml, or evaluate with --fp")
    scheme = Scheme.from_yaml(parsed.q_config)
    if parsed.brecq:
        if scheme.recon is None:
            raise ConfigError(f"--brecq needs a scheme with recon, but {parsed.q_config} has none")
        scheme = scheme.with_overrides("recon.weights_only=true")
    return with_preset(scheme, parsed.preset)


def _check_paths(parsed: argparse.Namespace) -> None:
    """Refuse files that contradict the other flags.

    Raises:
        ConfigError: they do.
    """
    if parsed.format_only and parsed.out is None:
        raise ConfigError("--format-only writes results without a score: name the file with --out")
    if parsed.fp and (parsed.load_sam_path or parsed.save_sam_path):
        raise ConfigError(
            "--fp evaluates the float model: leave away --load_sam_path and --save_sam_path, which "
            "are about a quantized one"
        )
    loaded = parsed.load_sam_path
    if loaded is not None and loaded.exists() and not is_quantized_file(loaded):
        raise ConfigError(
            f"--load_sam_path {loaded} is no quantized model: name a file of --save_sam_path, or "
            "give float weights with --cfg-options sam.checkpoint=FILE"
        )


def _data(config: DataConfig) -> DataSettings:
    return DataSettings(config.images, config.annotations, config.recursive)


def _eval_options(settings: RunSettings, options: Sequence[str]) -> RunSettings:
    """The one evaluation option with a meaning here: limit=N pictures.

    Raises:
        ConfigError: another option was given.
    """
    for option in options:
        key, _, value = option.partition("=")
        if key != "limit" or not value.isdigit():
            raise ConfigError(f"--eval-options {option}: only limit=N (first N pictures) is known")
        settings = replace(settings, limit=int(value))
    return settings


def _check_launcher(launcher: str) -> None:
    """Refuse processes that nobody started.

    Raises:
        ConfigError: torchrun did not start this process, though it should have.
    """
    if launcher != "none" and not started_by_torchrun():
        raise ConfigError(
            f"--launcher {launcher} was given, but torchrun did not start this process: use "
            "torchrun --nproc-per-node N ptq4sam/solver/test_quant.py --launcher pytorch ..."
        )


def _mention_flags_without_meaning(parsed: argparse.Namespace) -> None:
    for name, reason in _WITHOUT_MEANING.items():
        if getattr(parsed, name) not in (None, False):
            _log.warning("--%s is accepted but does nothing here: %s", name, reason)
    if parsed.eval and set(parsed.eval) != {"segm"}:
        _log.warning("--eval %s: mask AP (segm) is what is computed", " ".join(parsed.eval))


if __name__ == "__main__":
    sys.exit(main())
