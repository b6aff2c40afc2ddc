"""`ptq4sam distil`, from its flags to a file that can be scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq4sam.distillation.training import CURVES, STATE
from ptq4sam.errors import DataError
from ptq4sam.families import variant_of
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.runs import distilling
from tests.tiny_runs import refusal, run
from tests.tiny_sams import TinySam

pytest_plugins = ("tests.tiny_sam_fixtures",)

QUICK = ("phases.0.steps=2", "phases.0.batch=1", "sampling.rounds=1")


def command(tiny: TinySam, *more: object) -> list[object]:
    teacher = ["--teacher", "tiny", "--teacher-checkpoint", tiny.weights]
    return [
        *("distil", "--student", "tiny:embed_dim=16", *teacher, *tiny.data("train")),
        *("--output", "out.safetensors", "--work-dir", "work", "--workers", 0),
        *("--set", *QUICK, *more),
    ]


def test_a_student_is_trained_scored_and_reported(
    tiny_sam: TinySam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*command(tiny_sam))
    assert "written to out.safetensors" in capsys.readouterr().out
    assert not (tmp_path / "work" / STATE).exists()
    student = load_sam("tiny:embed_dim=16", "out.safetensors")
    assert student.image_encoder.pos_embed.shape[-1] == 16
    name = ["--model", "tiny:embed_dim=16", "--checkpoint", "out.safetensors"]
    run("evaluate", *name, *tiny_sam.data(), "--work-dir", "scored")
    run("report", "work")
    page = (tmp_path / "work" / "report.html").read_text()
    assert "tiny:embed_dim=16 learns from tiny" in page
    assert page.count("<svg") >= 5


def test_a_student_keeps_the_normalisations_that_it_begins_with(
    tiny_sam: TinySam, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "efficientvit_sam_nano"
    weights = variant_of(name).weights.embedded
    run(
        *("distil", "--student", name, "--init", weights, *tiny_sam.data("train")),
        *("--output", "out.safetensors", "--work-dir", "work", "--workers", 0, "--set", *QUICK),
    )
    before, after = load_file(weights), load_file("out.safetensors")
    assert before.keys() == after.keys()
    means = [key for key in before if key.endswith("running_mean")]
    assert len(means) == 26
    assert all(not torch.equal(before[key], after[key]) for key in means)
    assert "learns without" not in capsys.readouterr().err
    folded = load_sam(name, "out.safetensors").state_dict()
    save_file({key: value.contiguous() for key, value in folded.items()}, "folded.safetensors")
    again = ["--init", "folded.safetensors", "--output", "again.safetensors", "--work-dir", "two"]
    command = ["distil", "--student", name, *tiny_sam.data("train"), *again, "--workers", 0]
    run(*command, "--set", *QUICK)
    assert "learns without" in " ".join(capsys.readouterr().err.split())
    assert not [key for key in load_file("again.safetensors") if "running_mean" in key]
    torch.save({}, "empty.pth")
    said = refusal(capsys, *command, "--init", "empty.pth", "--set", *QUICK)
    assert "empty.pth" in said
    assert "learns without" not in said


def test_a_stopped_training_is_not_lost(
    tiny_sam: TinySam,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device", "out.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(distilling, "save_file", fail)
        assert "No space left" in refusal(capsys, *command(tiny_sam))
    assert (tmp_path / "work" / STATE).exists()
    assert "resume to go on with it" in refusal(capsys, *command(tiny_sam))
    changed = refusal(capsys, *command(tiny_sam, "seed=1"), "--resume")
    assert "settings" in changed
    assert "seed: 0, asked now: seed: 1" in changed
    run(*command(tiny_sam), "--resume")
    assert (tmp_path / "out.safetensors").exists()
    assert (tmp_path / "work" / CURVES).exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--set", "phases.0.step=2"], "unknown key; did you mean 'steps'"),
        (["--teacher", "vit_nano"], "prompts of student tiny:embed_dim=16 lie in a square of 64"),
        (["--annotations", "none.json"], "annotations none.json"),
        (["--settings", "none.yaml"], "none.yaml: no such settings file"),
        (["--output", "o.pth"], "weights to o.pth: name it *.safetensors"),
    ],
)
def test_mistakes_are_told_before_training(
    tiny_sam: TinySam, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if more[0] == "--teacher":
        more = [*more, "--teacher-checkpoint", str(vit_nano_weights())]
    assert told in refusal(capsys, *command(tiny_sam), *more)
    assert not Path("work", CURVES).exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--teacher-checkpoint", "t.safetensors"], "weights of a teacher were given, but no"),
        (["--calibration-images", "."], "calibration pictures are about quantizers"),
        (["--decoder-only"], "a float image encoder is about quantizers"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tiny_sam: TinySam, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--student", "tiny", "--output", "o.safetensors", *tiny_sam.data("train")]
    assert told in refusal(capsys, "distil", *own, *more)


def test_settings_in_a_file_leave_the_defaults_of_fine_tuning(
    tiny_sam: TinySam, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[distilling.DistillationRequest] = []
    monkeypatch.setattr(distilling, "distil", lambda request, _progress: asked.append(request))
    Path("own.yaml").write_text("seed: 3\n")
    own = ["--settings", "own.yaml", "--output", "o.safetensors", *tiny_sam.data("train")]
    run("distil", *own, "--scheme", tiny_sam.scheme)
    run("distil", *own)
    assert [request.settings.seed for request in asked] == [3, 3]
    assert [request.settings.phases[0].steps for request in asked] == [2000, 10_000]
    assert [request.settings.student for request in asked] == ["vit_nano", "tiny_vit_nano"]


def vit_nano_weights() -> Path:
    from ptq4sam.families import variant_of

    path = variant_of("vit_nano").weights.embedded
    assert path is not None
    return path


def test_pictures_without_annotations_are_refused(
    tiny_sam: TinySam, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tiny_sam.data("train")[:2]
    told = refusal(capsys, "distil", "--teacher", "vit_nano", *images, "--output", "o.safetensors")
    assert "learned from annotated pictures" in told


def test_calibration_pictures_are_drawn_by_the_seed_where_the_scheme_asks_for_it(
    tiny_sam: TinySam, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[object] = []

    def pictures(*arguments: object) -> None:
        seeds.append(arguments[6])
        raise DataError("enough is known")

    monkeypatch.setattr(distilling, "calibration_pictures", pictures)
    content = tiny_sam.scheme.read_text()
    assert "calibrate_order: file" in content
    for order in ("file", "random"):
        scheme = Path(f"{order}.yaml")
        scheme.write_text(content.replace("calibrate_order: file", f"calibrate_order: {order}"))
        asked = ["--scheme", scheme, *tiny_sam.data("train"), "--work-dir", order]
        own = ["--student", "tiny", "--init", tiny_sam.weights, "--output", "o.safetensors"]
        told = refusal(capsys, "distil", *own, *asked, "--set", *QUICK, "seed=5")
        assert "enough is known" in told
    assert seeds == [None, 5]


def test_a_quantized_student_resumes_and_is_scored(
    tiny_sam: TinySam,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tuned(name: str, *more: object) -> list[object]:
        return [
            *("distil", "--student", "tiny", "--init", tiny_sam.weights),
            *("--scheme", tiny_sam.scheme, *tiny_sam.data("train")),
            *("--output", f"{name}.safetensors", "--work-dir", name, "--workers", 0),
            *("--set", *QUICK, *more),
        ]

    run(*tuned("whole"))

    def fail(*_arguments: object) -> None:
        raise DataError("the audit's picture was lost")

    with monkeypatch.context() as patch:
        patch.setattr(distilling, "audit_model", fail)
        assert "picture was lost" in refusal(capsys, *tuned("cut"))
    assert (tmp_path / "cut" / distilling.JOURNAL).exists()
    run(*tuned("cut"), "--resume")
    assert not (tmp_path / "cut" / distilling.JOURNAL).exists()
    written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "cut")]
    assert written[0] == written[1]
    weights = ["--float-checkpoint", tiny_sam.weights]
    run("evaluate", "--checkpoint", "whole.safetensors", *weights, *tiny_sam.data())
    told = refusal(
        capsys,
        *tuned("none", "phases.0.terms={embedding: 0, token: 0, mask: 0, focal: 0, dice: 0}"),
    )
    assert "no term teaches masks" in told
