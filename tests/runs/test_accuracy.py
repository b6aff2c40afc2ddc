"""Accuracy control: on a model whose units' damage is known, and through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ptq4sam.cli import main
from ptq4sam.data import CocoDataset
from ptq4sam.deploy.storage import load
from ptq4sam.errors import ConfigError, DataError
from ptq4sam.evaluation import evaluate as evaluate_module
from ptq4sam.evaluation.evaluate import evaluate_sam
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.evaluation.segmentation import Segmented, segment
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.model.cache import ActivationCache
from ptq4sam.model.exchange import exchanged, units_with_norms
from ptq4sam.model.insertion import QuantizedSam, insert_quantizers, model_units
from ptq4sam.prompts import GroundTruth
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs import accuracy
from ptq4sam.runs import quantizing as quantizing_module
from ptq4sam.runs import validation as validation_module
from ptq4sam.runs.accuracy import (
    AccuracyReport,
    control_accuracy,
    levels_above,
    require_levels,
)
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.settings import AccuracySettings
from ptq4sam.runs.validation import Validation
from ptq4sam.sam.model import Sam
from ptq4sam.threads import COUNTS
from tests.families.efficientvit.conftest import tiny_sam as tiny_efficientvit
from tests.tiny_runs import QUICK, SCHEMES, Tiny, read_metrics, run

pytest_plugins = ("tests.tiny_fixtures",)

DECODER = "mask_decoder.transformer"


@pytest.fixture(scope="module")
def scheme() -> Scheme:
    return Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml").with_overrides(*QUICK, "calibrate=2")


class KnownDamage:
    """Stands for a validation set: a unit costs score by its bits, each its own."""

    def __init__(
        self, damage: dict[str, float], others: float = 0.01, at_8_bits: float = 0.0
    ) -> None:
        self.damage, self.others, self.at_8_bits = damage, others, at_8_bits

    def score(self, sam: Sam, encoder: str) -> float:
        if not isinstance(sam, QuantizedSam):
            return 90.0
        found = {
            name: {quantizer.grid.bits for _, quantizer in quantizers(unit)}
            for name, unit in model_units(sam)
        }
        return 90 - sum(self._cost(name, bits) for name, bits in found.items())

    def _cost(self, name: str, bits: set[int]) -> float:
        full = self.damage.get(name, self.others)
        # The state of a linear attention has more bits than the rest of its unit.
        return {4: full, 8: self.at_8_bits, 0: 0.0}[min(bits, default=0)]

    def gains_of_changes(
        self, sam: QuantizedSam, units: dict[str, dict[str, nn.Module]], *_: object
    ) -> dict[str, float]:
        before, gains = self.score(sam, ""), {}
        for name, modules in units.items():
            with exchanged(sam, modules):
                gains[name] = self.score(sam, "") - before
        return gains


def controlled(
    scheme: Scheme,
    validation: KnownDamage,
    tmp_path: Path,
    max_drop: float,
    whole: Sam | None = None,
) -> tuple[QuantizedSam, AccuracyReport]:
    """Of the decoder of vit_nano, or of another SAM as a whole."""
    float_sam = whole or load_sam("vit_nano")
    sam = insert_quantizers(float_sam, scheme, whole is not None)

    def at_level(level: int | str) -> QuantizedSam:
        names = [name for name, _ in model_units(sam)]
        units = scheme.with_units(dict.fromkeys(names, level))
        return insert_quantizers(float_sam, units, whole is not None)

    report = control_accuracy(
        sam,
        float_sam,
        at_level,
        validation,  # type: ignore[arg-type]
        AccuracySettings(max_drop),
        Measurements(tmp_path / "measurements.json", {}, resume=False),
    )
    return sam, report


WORST = f"{DECODER}.final_attn_token_to_image"
SECOND = f"{DECODER}.layers.1.mlp"


def test_the_fewest_of_the_worst_units_are_returned(scheme: Scheme, tmp_path: Path) -> None:
    validation = KnownDamage({WORST: 5, SECOND: 3, f"{DECODER}.layers.0.mlp": 1})
    sam, report = controlled(scheme, validation, tmp_path, max_drop=2)
    assert report.kept == sam.scheme.units == {WORST: 8, SECOND: 8}
    assert list(report.effects["8"])[:3] == [WORST, SECOND, f"{DECODER}.layers.0.mlp"]
    assert report.met
    assert report.score_before == pytest.approx(90 - 9 - 0.06)
    assert report.score == pytest.approx(90 - 1.06)
    # Float, as it was, and at most log2(9) + 1 others.
    assert report.measured <= 2 + 4


def test_nothing_is_returned_where_the_drop_is_met(scheme: Scheme, tmp_path: Path) -> None:
    sam, report = controlled(scheme, KnownDamage({WORST: 1}), tmp_path, max_drop=2)
    assert (report.kept, report.effects, sam.scheme.units) == ({}, {}, {})
    assert report.measured == 2


def test_where_8_bits_do_not_do_units_become_float(scheme: Scheme, tmp_path: Path) -> None:
    validation = KnownDamage({WORST: 6}, others=5, at_8_bits=0.5)
    sam, report = controlled(scheme, validation, tmp_path, max_drop=3)
    assert report.met
    assert (report.score_before, report.score) == (44, 87)
    assert sorted(map(str, report.kept.values())) == ["8"] * 6 + ["float"] * 3
    assert sam.scheme.units == report.kept
    sam, report = controlled(scheme, validation, tmp_path, max_drop=0)
    assert set(report.kept.values()) == {"float"}
    assert report.score == report.float_score


def test_units_that_a_scheme_keeps_higher_are_not_lowered(scheme: Scheme, tmp_path: Path) -> None:
    given = scheme.with_units({SECOND: "float"})
    sam, report = controlled(given, KnownDamage({WORST: 5, SECOND: 3}), tmp_path, max_drop=0.08)
    assert sam.scheme.units == {SECOND: "float", WORST: 8}
    assert SECOND not in report.effects["8"]


def test_units_without_quantizers_are_not_returned(scheme: Scheme, tmp_path: Path) -> None:
    sam, report = controlled(scheme, KnownDamage({}), tmp_path, 0, tiny_efficientvit())
    bare = {name for name, unit in model_units(sam) if not any(True for _ in quantizers(unit))}
    assert "image_encoder.norm" in bare
    others = {name for name, _ in model_units(sam)} - bare
    assert report.kept.keys() == report.effects["8"].keys() == others


@pytest.mark.parametrize(
    ("weights", "activations", "levels"),
    [(4, 4, [8, "float"]), (6, 8, [8, "float"]), (8, 8, ["float"]), (4, 16, ["float"])],
)
def test_units_are_returned_to_more_bits_only(
    scheme: Scheme, weights: int, activations: int, levels: list[int | str]
) -> None:
    bits = (f"w_qconfig.bit={weights}", f"a_qconfig.bit={activations}")
    assert levels_above(scheme.with_overrides(*bits)) == levels


def test_a_grid_without_the_bits_of_a_level_is_refused_before_anything(scheme: Scheme) -> None:
    require_levels(scheme.with_overrides("slots={input@before-attention: {grid: grouped}}"))
    with pytest.raises(ConfigError, match=r"to 8 bits, which slots\.input@after-gelu .* up to 6"):
        require_levels(scheme.with_overrides("slots={input@after-gelu: {grid: hybrid}}"))
    with pytest.raises(ConfigError, match=r"to 8 bits, which slots\.softmax cannot .* up to 6"):
        require_levels(scheme.with_overrides("slots={softmax: {grid: lnq}}"))


@pytest.mark.usefixtures("small_nano")
def test_a_change_alone_scores_as_the_whole_model_with_it(
    tiny: Tiny, scheme: Scheme, tmp_path: Path
) -> None:
    """What is run from the changed unit on equals a whole evaluation, bit for bit."""
    from ptq4sam.model.quantize import quantize_sam
    from ptq4sam.runs.calibration import calibration_pictures

    dataset = CocoDataset(tiny.images(), tiny.annotations(), limit=2)
    source = GroundTruth(dataset)
    float_sam = load_sam("vit_nano")
    items = calibration_pictures(float_sam, dataset, source, 1, Prompting())
    # Scales are folded into norms, which lie between units.
    scheme = scheme.with_overrides("ptq4sam.AGQ=false", "methods=[norm-scales]")
    sam = quantize_sam(float_sam, items, scheme)
    names = [name for name, _ in model_units(sam)]
    every = insert_quantizers(float_sam, scheme.with_units(dict.fromkeys(names, "float")))
    chosen = ["image_encoder.blocks.0.mlp", "image_encoder.neck", SECOND]
    units = {name: units_with_norms(every)[name] for name in chosen}
    validation = Validation(
        dataset, source, Prompting(), "mean_iou", ActivationCache(sam.device, 0, tmp_path)
    )
    measurements = Measurements(tmp_path / "measurements.json", {}, resume=False)
    assert list(units[chosen[0]]) == [chosen[0], "image_encoder.blocks.0.norm2"]
    gains = validation.gains_of_changes(sam, units, 2, measurements, "test")

    def score(model: Sam) -> float:
        return 100 * evaluate_sam(model, dataset, source, Prompting()).metrics["mean_iou"]

    before = score(sam)
    assert validation.score(sam, "4 bits") == before
    for name, modules in units.items():
        with exchanged(sam, modules):
            assert gains[name] == score(sam) - before
            # The decoder alone changed: the encoder is not run again.
            if name == SECOND:
                assert validation.score(sam, "4 bits") == score(sam)
    assert len(set(gains.values())) == 3


def test_all_ways_of_scoring_compute_with_as_many_threads(
    tiny: Tiny, scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float units add in another order with other numbers of threads, on some processors."""
    counted: list[int] = []

    def counting(*args: Any) -> Segmented:
        counted.append(torch.get_num_threads())
        return segment(*args)

    for module in (evaluate_module, validation_module):
        monkeypatch.setattr(module, "segment", counting)
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    dataset = CocoDataset(tiny.images(), tiny.annotations(), limit=1)
    source, cache = GroundTruth(dataset), ActivationCache(torch.device("cpu"), 0, tmp_path)
    float_sam = load_sam("vit_nano")
    paths = [path for path, _ in model_units(insert_quantizers(float_sam, scheme))]
    sam = insert_quantizers(float_sam, scheme.with_units(dict.fromkeys(paths, "float")))
    unit = dict(model_units(sam))[SECOND]
    validation = Validation(dataset, source, Prompting(), "mean_iou", cache)
    measurements = Measurements(tmp_path / "measurements.json", {}, resume=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluate_sam(sam, dataset, source, Prompting())
        validation.score(sam, "float")
        validation.gains_of_changes(sam, {SECOND: {SECOND: unit}}, 1, measurements, "test")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert counted == [1] * 4


def quantize(tiny: Tiny, work_dir: Path, scheme: list[str], *more: object) -> list[str]:
    data = ["--validation-images", tiny.images(), "--validation-annotations", tiny.annotations()]
    output = ["--output", work_dir / "model.safetensors", "--work-dir", work_dir]
    command = ["quantize", *scheme, "--decoder-only", *data, *output, *more]
    return [str(part) for part in command]


def test_a_model_within_the_drop_is_written_and_says_what_was_kept(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = [*tiny.model(), *tiny.scheme("ptq4sam-s44")]
    run(*quantize(tiny, tmp_path / "as it is", scheme, "--max-drop", 99))
    before = read_metrics(tmp_path / "as it is")["accuracy_control"]
    assert (before["kept"], before["met"]) == ({}, True)
    allowed = before["drop"] / 2
    assert allowed > 0
    run(*quantize(tiny, tmp_path / "kept", scheme, "--max-drop", allowed))
    control = read_metrics(tmp_path / "kept")["accuracy_control"]
    assert control["met"]
    assert control["drop"] <= allowed
    assert control["score_before"] == before["score"]
    assert control["kept"]
    assert "units kept higher" in capsys.readouterr().out
    path = tmp_path / "kept" / "model.safetensors"
    sam = load(path)
    assert sam.scheme.units == control["kept"]
    assert Scheme.from_yaml(tmp_path / "kept" / "scheme.yaml").units == control["kept"]
    dataset = CocoDataset(tiny.images(), tiny.annotations())
    found = evaluate_sam(sam, dataset, GroundTruth(dataset), Prompting()).metrics["mean_iou"]
    assert 100 * found == control["score"]
    assert main(["audit", str(path)]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name}: kept" in told for name in control["kept"])


def test_a_killed_control_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Masks are kept for AP alone, of which random weights have none: the embedded model's, quickly.
    scheme = tiny.scheme("ptq4sam-s44", "ptq4sam.AGQ=false")
    asked = ["--max-drop", "0.01", "--drop-pictures", "2", "--drop-metric", "AP"]
    asked += ["--max-per-image", "1"]
    run(*quantize(tiny, tmp_path / "whole", scheme, *asked))
    command = quantize(tiny, tmp_path / "cut", scheme, *asked)
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "take_units", fail)
        assert main(command) == 2
    measured = tmp_path / "cut" / "journal" / "measurements.json"
    values = json.loads(measured.read_text())["values"]
    assert len(values) >= 2 + 2
    with monkeypatch.context() as patch:
        # Whatever is known is not measured again.
        patch.setattr(quantizing_module, "Measurements", only_new(values))
        run(*command, "--resume")
    whole, cut = (read_metrics(tmp_path / name) for name in ("whole", "cut"))
    assert whole["accuracy_control"] == cut["accuracy_control"]
    assert whole["accuracy_control"]["kept"]
    models = [load(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    states = [model.state_dict() for model in models]
    assert models[0].scheme == models[1].scheme
    assert states[0].keys() == states[1].keys()
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def fail(*_: object) -> None:
    raise DataError("the power went")


def only_new(values: dict[str, Any]) -> Callable[..., Measurements]:
    class OnlyNew(Measurements):
        def value(self, name: str, measure: Callable[[], Any]) -> Any:
            return super().value(name, fail if name in values else measure)

    return OnlyNew


def test_many_measurements_are_in_several_files(tmp_path: Path) -> None:
    """None of which is written again once it is full; a run with less leaves none of another."""
    path = tmp_path / "measurements.json"
    first = Measurements(path, {"seed": "1"}, resume=False)
    for number in range(150):
        assert first.value(f"x{number}", lambda number=number: number) == number
    sizes = [len(json.loads(file.read_text())["values"]) for file in tmp_path.iterdir()]
    assert sorted(sizes) == [22, 64, 64]
    again = Measurements(path, {"seed": "1"}, resume=True)
    assert [again.value(f"x{number}", fail) for number in range(150)] == list(range(150))
    assert again.value("y", lambda: 7) == 7
    last = Measurements(path, {"seed": "1"}, resume=True)
    assert (last.value("x149", fail), last.value("y", fail)) == (149, 7)
    fresh = Measurements(path, {"seed": "2"}, resume=False)
    assert fresh.value("x0", lambda: 3) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["measurements.json"]


def test_measurements_of_another_run_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    assert Measurements(path, {"seed": "1"}, resume=False).value("x", lambda: 0.1) == 0.1
    assert Measurements(path, {"seed": "1"}, resume=True).value("x", lambda: 0.2) == 0.1
    assert Measurements(path, {"seed": "1"}, resume=False).value("x", lambda: 0.2) == 0.2
    with pytest.raises(ConfigError, match="seed differ"):
        Measurements(path, {"seed": "2"}, resume=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--drop-metric", "AP"], "add --max-drop"),
        (["--max-drop", "-1"], "0 or more"),
        (["--max-drop", "1"], "measured on annotated pictures"),
        (
            ["--max-drop", "1", "--validation-images", "x"],
            "their annotations together",
        ),
        (["--max-drop", "1", "--scheme-options", "compat=published"], "cannot mend"),
    ],
)
def test_what_cannot_be_controlled(
    tiny: Tiny, arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = tiny.scheme("ptq4sam-s44")
    command = ["quantize", *scheme, *arguments, "--output", str(tmp_path / "m.safetensors")]
    assert main(command) == 2
    assert told in " ".join(capsys.readouterr().err.split())
