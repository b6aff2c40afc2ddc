"""`ptq4sam sensitivity`: a fragile unit is found, effects are those of toggling by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.deploy.cost import meta_sam
from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import DataError
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families import VARIANTS
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.switches import Switches
from ptq4sam.prompts import GroundTruth
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.measurements import Measurements
from ptq4sam.sam.predictor import Predictor
from ptq4sam.studies.sensitivity import study as study_module
from ptq4sam.studies.sensitivity.study import ALL_BUT, ONLY, QUANTIZED, Study
from ptq4sam.studies.sensitivity.targets import Target, targets_of
from tests.model.conftest import TINY_VARIANT
from tests.tiny_runs import SCHEMES, run
from tests.tiny_sams import TinySam

pytest_plugins = ("tests.tiny_sam_fixtures",)

FRAGILE = "image_encoder.blocks.0.attn"
DECODER = "mask_decoder.transformer"


@pytest.fixture(scope="module")
def fragile(tiny_files: TinySam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized file whose one attention hardly keeps anything of its query."""
    folder = tmp_path_factory.mktemp("fragile")
    whole, path = folder / "whole.safetensors", folder / "fragile.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", TINY_VARIANT)
        run("quantize", *tiny_files.arguments(), "--output", whole, "--work-dir", folder / "w")
        sam = load(whole)
        # At 8 bits nothing else costs much.
        dict(quantizers(sam))[f"{FRAGILE}.core.query_quantizer"].scale.mul_(40)
        save(sam, path)
    return path


def studied(work_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((work_dir / "sensitivity.json").read_text())
    return content


def of_file(tiny_sam: TinySam, path: Path, work_dir: Path, *more: object) -> list[str]:
    model = ["--checkpoint", path, "--float-checkpoint", tiny_sam.weights]
    options = ["--work-dir", work_dir, "--proxy-pictures", 1, "--pictures", 2, *more]
    return [str(part) for part in ("sensitivity", *model, *tiny_sam.data(), *options)]


def test_the_fragile_unit_is_the_worst(
    tiny_sam: TinySam, fragile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--by", "unit", "quantizer", "--measure", 3, "--pictures", 9]
    run(*of_file(tiny_sam, fragile, tmp_path / "s", *asked))
    content = studied(tmp_path / "s")
    # There are three to measure on.
    assert content["pictures"] == {"proxy": 1, "measured": 3}
    by_error = min(
        content["targets"], key=lambda target: target["only"]["embedding_sqnr_db"] or 999
    )
    assert by_error["path"] == FRAGILE
    targets = {target["name"]: target for target in content["targets"]}
    worst = f"{FRAGILE}.core.query_quantizer:query"
    assert targets[worst]["grain"] == "quantizer"
    errors = {
        name: target["only"]["embedding_relative_error"]
        for name, target in targets.items()
        if target["grain"] == "quantizer"
    }
    assert max(errors, key=errors.__getitem__) == worst
    unit = targets[FRAGILE]
    assert (unit["network"], unit["block"], unit["layer"]) == ("image_encoder", "blocks.0", "attn")
    # Without it the embedding is better; with it alone it is worse than without anything.
    whole = content["quantized"]["embedding_sqnr_db"]
    assert unit["all_but"]["embedding_sqnr_db"] > whole
    assert content["float"]["embedding_sqnr_db"] is None
    assert content["float"]["agreement"] == 1
    assert sum(target["measured"] for target in content["targets"]) == 2 * 3
    assert all(
        (target["only"]["AP"] is not None) == target["measured"] for target in targets.values()
    )
    lines = list(csv.DictReader((tmp_path / "s" / "sensitivity.csv").open()))
    assert [line["name"] for line in lines] == [target["name"] for target in content["targets"]]
    assert float(lines[0]["only.agreement"]) == content["targets"][0]["only"]["agreement"]
    shown = capsys.readouterr().out
    assert content["targets"][0]["name"] in shown


def test_effects_are_those_of_whole_models_toggled_by_hand(
    tiny_sam: TinySam, fragile: Path, tmp_path: Path
) -> None:
    sam, float_sam = load(fragile), load_sam("tiny", tiny_sam.weights)
    folder = tiny_sam.folder
    dataset = CocoDataset(folder / "images/val", folder / "annotations/val.json", limit=2)
    source = GroundTruth(dataset)
    targets = targets_of(sam, ("model", "unit"), ("softmax", "weights"), ["*:*", f"{DECODER}*"])
    study = Study(
        sam, float_sam, dataset, source, Prompting(), Measurements(tmp_path / "m", {}, resume=False)
    )
    effects = study.effects(targets, 2, "test", scored=True)
    switches = Switches(sam, float_sam)

    def check(found: Any, names: frozenset[str]) -> None:
        with switches.only(names):
            metrics = evaluate_sam(sam, dataset, source, Prompting(), reference=float_sam).metrics
        assert found.mean_iou == metrics["mean_iou"]
        assert metrics["AP"] == found.AP
        assert found.agreement == pytest.approx(metrics["agreement"], abs=0.01)

    check(effects[QUANTIZED, ""], switches.names)
    for target in targets[::3]:
        check(effects[ONLY, target.name], target.quantizers)
        check(effects[ALL_BUT, target.name], switches.names - target.quantizers)


def test_errors_of_the_embedding_by_hand(tiny_sam: TinySam, fragile: Path, tmp_path: Path) -> None:
    sam, float_sam = load(fragile), load_sam("tiny", tiny_sam.weights)
    folder = tiny_sam.folder
    dataset = CocoDataset(folder / "images/val", folder / "annotations/val.json", limit=2)
    target = targets_of(sam, ("unit",), (), [FRAGILE])[0]
    measurements = Measurements(tmp_path / "m", {}, resume=False)
    study = Study(sam, float_sam, dataset, GroundTruth(dataset), Prompting(), measurements)
    effect = study.effects([target], 2, "test")[ONLY, FRAGILE]
    signal = noise = 0.0
    for record in dataset.images:
        pixels = Predictor(float_sam).pixels(dataset.load(record))
        with torch.no_grad():
            exact = float_sam.image_encoder(pixels)
            with Switches(sam, float_sam).only(target.quantizers):
                changed = sam.image_encoder(pixels)
        signal += float(exact.double().square().sum())
        noise += float((changed - exact).double().square().sum())
    assert effect.embedding_relative_error == pytest.approx(math.sqrt(noise / signal), rel=1e-3)
    assert effect.embedding_sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


def test_a_killed_study_goes_on(
    tiny_sam: TinySam, fragile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--measure", 2, "--roles"]
    run(*of_file(tiny_sam, fragile, tmp_path / "whole", *options))
    command = of_file(tiny_sam, fragile, tmp_path / "cut", *options)
    seen: list[int] = []
    measure = Study._picture

    def counting(self: Study, *arguments: Any) -> Any:
        if len(seen) == 2 and not seen[-1]:
            raise DataError("the power went")
        seen.append(0)
        return measure(self, *arguments)

    monkeypatch.setattr(study_module.Study, "_picture", counting)
    assert main(command) == 2
    seen[-1] = 1
    run(*command, "--resume")
    # One picture of the proxy and two of the worst, each once.
    assert len(seen) == 3
    assert studied(tmp_path / "cut") == studied(tmp_path / "whole")


def test_it_quantizes_by_a_scheme_first(tiny_sam: TinySam, tmp_path: Path) -> None:
    options = ["--by", "stage", "--roles", "--proxy-pictures", 1, "--measure", 0]
    run("sensitivity", *tiny_sam.arguments(), *options, "--work-dir", tmp_path / "s")
    content = studied(tmp_path / "s")
    assert [t["path"] for t in sorted(content["targets"], key=lambda t: t["path"])] == [
        "image_encoder",
        DECODER,
    ]
    assert content["targets"][0]["bits"] == [4]
    assert not (tmp_path / "s" / "journal").exists()


def targets(*arguments: Any) -> list[Target]:
    sam = meta_sam("vit_nano", Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml"))
    assert isinstance(sam, QuantizedSam)
    return targets_of(sam, *arguments)


def test_targets_cover_every_quantizer_once() -> None:
    every = {
        name
        for name, _ in quantizers(
            meta_sam("vit_nano", Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml"))
        )
    }
    for grain in ("model", "network", "block", "unit", "quantizer"):
        found = [name for target in targets((grain,), ()) for name in target.quantizers]
        assert sorted(found) == sorted(every), grain
    for roles in (
        ("weights", "activations"),
        ("weights", "inputs", "query", "key", "value", "softmax"),
    ):
        split = [t for t in targets(("model",), roles) if t.role]
        assert sorted(name for t in split for name in t.quantizers) == sorted(every)


def test_patterns_address_stage_block_layer_and_role() -> None:
    def names(*patterns: str) -> list[str]:
        return [target.name for target in targets(("unit",), ("softmax",), patterns)]

    assert names("image_encoder.blocks.3.attn") == [
        "image_encoder.blocks.3.attn",
        "image_encoder.blocks.3.attn:softmax",
    ]
    assert names("*.blocks.[01].attn:softmax") == [
        "image_encoder.blocks.0.attn:softmax",
        "image_encoder.blocks.1.attn:softmax",
    ]
    assert len(names(f"{DECODER}.*cross_attn*:softmax")) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--targets", "image_encoder.blocks.0.atn"], "did you mean 'image_encoder.blocks.0.attn'"),
        (["--targets", "nek.*:softmax"], "no such part of the model"),
        (["--metric", "mean_iuo"], "unknown key; did you mean 'mean_iou'"),
        (["--by", "units"], "did you mean 'unit'"),
        (["--roles", "softmx"], "did you mean 'softmax'"),
        (["--pictures", "0"], "1 or more"),
        (["--metric", "mean_iou", "--prompts", "scene-detector"], "use ground-truth prompts"),
        (["--scheme-options", "compat=published"], "compat: faithful"),
    ],
)
def test_bad_input(
    tiny_sam: TinySam,
    options: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["sensitivity", *tiny_sam.arguments(), *options, "--work-dir", str(tmp_path / "s")]
    assert main(command) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_lists_the_targets(
    tiny_sam: TinySam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dry-run", "--targets", "*.blocks.1.attn:softmax", "--work-dir", tmp_path / "s"]
    run("sensitivity", *tiny_sam.arguments(), *options)
    assert capsys.readouterr().out == "image_encoder.blocks.1.attn:softmax\n"
    assert not (tmp_path / "s").exists()


def test_a_float_model_has_no_sensitivities(
    tiny_sam: TinySam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "tiny", "--checkpoint", str(tiny_sam.weights)]
    command = ["sensitivity", *model, *tiny_sam.data(), "--work-dir", str(tmp_path)]
    assert main(command) == 2
    assert "the model is not quantized" in capsys.readouterr().err


def test_powers_are_sums_of_squares() -> None:
    exact = torch.tensor([1.0, 2.0])
    power = study_module.Power.of(exact, torch.tensor([1.0, 1.5]))
    assert (power.signal, power.noise) == (5.0, 0.25)
    assert np.isclose(10 * np.log10(5 / 0.25), 13.0103)
