from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4sam.quantization.scheme import Scheme
from ptq4sam.solver.test_quant import build_parser, main, settings_from
from tests.tiny_runs import REPOSITORY, Tiny, numbers, read_metrics

pytest_plugins = ("tests.tiny_fixtures",)

CONFIGS = REPOSITORY / "projects" / "configs" / "scenes"
GROUND_TRUTH = CONFIGS / "ground-truth_sam-vit-nano.py"
EXP = REPOSITORY / "exp"


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere: Path, small_nano: None) -> None:
    """Nothing is written beside the repository, and vit_nano is small."""


def command(tiny: Tiny, *flags: object) -> list[str]:
    """The published command on the tiny data."""
    options = [
        f"sam.checkpoint={tiny.checkpoint}",
        f"data.images={tiny.images()}",
        f"data.annotations={tiny.annotations()}",
        "data.limit=1",
        f"calibration.images={tiny.images('train')}",
        f"calibration.annotations={tiny.annotations('train')}",
    ]
    config = ["--config", str(GROUND_TRUTH), "--cfg-options", *options]
    return [*config, *map(str, flags)]


def test_quantizes_saves_and_loads(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = tiny.short_scheme("ptq4sam-s66", tmp_path / "scheme.yaml")
    saved = tmp_path / "saved" / "model.safetensors"
    asked = command(tiny, "--q_config", scheme, "--save_sam_path", saved, "--work-dir", "a")
    assert main([*asked, "--eval", "segm", "--show", "--out", "a/masks.json"]) == 0
    first = read_metrics(tmp_path / "a")
    assert {"AP", "mean_iou", "agreement"} <= first.keys()
    assert first["quantized"]
    assert list((tmp_path / "a" / "show").iterdir())
    # Without --quant-encoder only the decoder is quantized: 2 layers of 14 and the last attention.
    head = first["audit"]["report"][0]
    assert head.startswith("audit passed: 32 layers")
    assert head.endswith("image encoder float")
    assert (first["encoder"], first["encoder_quantized"]) == ("float", False)
    capsys.readouterr()
    assert main(command(tiny, "--load_sam_path", saved, "--work-dir", "b")) == 0
    assert numbers(read_metrics(tmp_path / "b")) == numbers(first)


def test_quantized_encoder_and_weights_only(tiny: Tiny, tmp_path: Path) -> None:
    scheme = tiny.short_scheme("minmax66", tmp_path / "scheme.yaml")
    asked = command(tiny, "--q_config", scheme)
    assert settings_from(build_parser().parse_args(asked)).quantize_encoder is False
    parsed = build_parser().parse_args([*asked, "--quant-encoder"])
    assert settings_from(parsed).quantize_encoder is True
    scheme = tiny.short_scheme("config66", tmp_path / "learned.yaml")
    parsed = build_parser().parse_args(command(tiny, "--q_config", scheme, "--brecq"))
    used = settings_from(parsed).scheme
    assert isinstance(used, Scheme)
    assert used.recon is not None
    assert used.recon.weights_only is True


def test_float_model_and_flags_without_meaning(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = ["--launcher", "none", "--tmpdir", "t", "--gpu-collect", "--fuse-conv-bn"]
    idle += ["--short4cut", "--resign_end", "--q_config", str(EXP / "config66.yaml")]
    assert main(command(tiny, "--fp", "--device", "cpu", "--show-dir", "shown", *idle)) == 0
    told = " ".join(capsys.readouterr().err.split())
    for flag in ("tmpdir", "gpu_collect", "fuse_conv_bn", "short4cut", "resign_end"):
        assert f"--{flag} is accepted but does nothing here" in told
    assert "--q_config has no meaning" in told
    metrics = read_metrics(tmp_path / "work_dirs" / GROUND_TRUTH.stem)
    assert metrics["quantized"] is False
    assert "mean_iou" in metrics
    assert len(list((tmp_path / "shown").iterdir())) == 1


def test_a_launcher_that_launched_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(command(tiny, "--fp", "--launcher", "pytorch")) == 2
    assert "use torchrun --nproc-per-node N" in " ".join(capsys.readouterr().err.split())


def test_format_only_writes_masks_without_a_score(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(tiny, "--fp", "--format-only", "--work-dir", "w")
    assert main(asked) == 2
    assert "--out" in capsys.readouterr().err
    assert main([*asked, "--out", "masks.json"]) == 0
    metrics = read_metrics(tmp_path / "w")
    assert not {"AP", "mean_iou", "agreement"} & metrics.keys()
    masks = json.loads((tmp_path / "masks.json").read_text())
    assert len(masks) == metrics["masks"] > 0


def test_every_prompting_key_of_a_configuration_is_used(tiny: Tiny) -> None:
    keys = ["multimask=True", "cascade=True", "best_in_multi_mask=True", "use_sam_iou=True"]
    keys += ["max_per_image=7", "score_threshold=0.5"]
    asked = command(tiny, "--fp")
    at = asked.index("--fp")
    asked[at:at] = [f"prompting.{key}" for key in keys]
    prompting = settings_from(build_parser().parse_args(asked)).prompting
    assert (prompting.multimask, prompting.cascade, prompting.best_in_multi_mask) == (True,) * 3
    assert prompting.use_sam_iou
    assert (prompting.max_per_image, prompting.score_threshold) == (7, 0.5)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--q_config"),
        (["--q_config", "nowhere.yaml"], "nowhere.yaml"),
        (["--q_config", str(EXP / "minmax44.yaml"), "--brecq"], "recon"),
        (["--fp", "--load_sam_path", "q.safetensors"], "--fp"),
        (["--fp", "--save_sam_path", "q.safetensors"], "--fp"),
        (["--load_sam_path", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--load_sam_path", "FLOAT"], "no quantized model"),
        (["--q_config", str(EXP / "minmax44.yaml"), "--save_sam_path", "q.pth"], "*.safetensors"),
        (["--fp", "--options", "classwise=True"], "limit=N"),
        (["--fp", "--eval-options", "limit=0"], "1 or more"),
        (["--fp", "--gpu-id", "99"], "cuda:99"),
        (["--fp", "--prompts", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    given = [str(tiny.checkpoint) if flag == "FLOAT" else flag for flag in flags]
    assert main(command(tiny, *given)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert told in last


def test_detector_that_is_not_there_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    config = REPOSITORY / "projects" / "configs" / "hdetr" / "r50-hdetr_sam-vit-b.py"
    asked = ["--config", str(config), "--fp", "--cfg-options"]
    assert main([*asked, "detector.checkpoint=none.pth"]) == 2
    assert "  detector none.pth\n" in capsys.readouterr().err


def test_float_weights_of_the_configuration_give_the_agreement_of_a_file(
    tiny: Tiny, tmp_path: Path
) -> None:
    scheme = tiny.short_scheme("minmax66", tmp_path / "scheme.yaml")
    saved = tmp_path / "model.safetensors"
    assert main(command(tiny, "--q_config", scheme, "--save_sam_path", saved)) == 0
    assert main(command(tiny, "--load_sam_path", saved, "--work-dir", "w")) == 0
    assert 0 <= read_metrics(tmp_path / "w")["agreement"] <= 1


def test_runs_as_a_script(tiny: Tiny) -> None:
    script = Path("ptq4sam") / "solver" / "test_quant.py"
    asked = [sys.executable, str(script), *command(tiny, "--fp", "--eval-options", "limit=0")]
    ended = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: asked for the first 0 pictures")
