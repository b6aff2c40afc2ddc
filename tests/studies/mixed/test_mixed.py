"""`ptq4sam mixed`: the integer program against brute force, prices against counts, the scheme."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ptq4sam.cli import main
from ptq4sam.data.scenes import write_scenes
from ptq4sam.deploy.cost import count
from ptq4sam.errors import ConfigError
from ptq4sam.families import VARIANTS
from ptq4sam.model.insertion import insert_quantizers, model_units
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.studies.mixed.allocation import Option, allocate
from ptq4sam.studies.mixed.prices import Budget, Prices, prices_of, read_budget
from ptq4sam.studies.mixed.run import choose, falling, require_possible
from ptq4sam.studies.sensitivity import study as study_module
from tests.families.efficientvit.conftest import TINY_VARIANT as TINY_EFFICIENTVIT
from tests.families.efficientvit.conftest import tiny_sam as tiny_efficientvit
from tests.model.conftest import TINY_VARIANT
from tests.tiny_runs import SCHEMES, run
from tests.tiny_sams import TinySam

pytest_plugins = ("tests.tiny_sam_fixtures",)

BITS = (3, 4, 6)
PAIRS = list(itertools.product(BITS, BITS))


@pytest.fixture(scope="module")
def scheme() -> Scheme:
    return Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml")


@pytest.fixture(scope="module")
def prices(scheme: Scheme) -> Prices:
    """Of vit_nano, whose encoder is quantized."""
    return prices_of("vit_nano", scheme, True, PAIRS)


def best_of_all(units: dict[str, list[Option]], limits: list[int]) -> float:
    """The least error of all combinations within the limits."""
    return min(
        sum(option.error for option in taken)
        for taken in itertools.product(*units.values())
        if all(
            sum(option.prices[place] for option in taken) <= limit
            for place, limit in enumerate(limits)
        )
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_trying_all_finds(seed: int) -> None:
    draw = random.Random(seed)
    scale = draw.choice([1, 10**4, 10**9])
    units = {
        f"unit {number}": [
            Option(
                str(place),
                draw.random() * 10.0 ** draw.randint(-6, 0),
                (draw.randint(1, 9) * scale + draw.randint(0, 1), draw.randint(1, 99)),
            )
            for place in range(4)
        ]
        for number in range(5)
    }
    limits = [
        sum(draw.choice(options).prices[place] for options in units.values()) for place in (0, 1)
    ]
    possible = [min(o.prices[0] for o in those) for those in units.values()]
    limits[1] = max(limits[1], 5 * 99)
    assert sum(possible) <= limits[0]
    found = allocate(units, limits)
    for place, limit in enumerate(limits):
        assert sum(option.prices[place] for option in found.values()) <= limit
    error = sum(option.error for option in found.values())
    assert error == pytest.approx(best_of_all(units, limits), rel=1e-4, abs=1e-9)


def test_an_impossible_program_is_told() -> None:
    with pytest.raises(ValueError, match="no choice"):
        allocate({"a": [Option("w4a4", 0.0, (5,))]}, [4])


@pytest.mark.parametrize(("encoder", "side"), [(True, None), (False, None), (True, 128)])
def test_prices_are_what_cost_counts(
    scheme: Scheme, encoder: bool, side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", TINY_VARIANT)
    prices = prices_of("tiny", scheme, encoder, PAIRS, side)
    draw = random.Random(0)
    chosen = {unit: draw.choice(PAIRS) for unit in prices.units}
    levels: dict[str, int | str] = {unit: f"w{w}a{a}" for unit, (w, a) in chosen.items()}
    mixed = scheme.with_units(levels)
    total = count("tiny", mixed, quantize_encoder=encoder, image_size=side).total
    assert prices.total(chosen) == (total.weight_bytes, total.bit_operations)


def test_what_is_in_no_unit_has_the_bits_of_the_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", TINY_VARIANT)
    upscaling = Scheme.from_yaml(SCHEMES / "tinysam/w8a8.yaml")
    prices = prices_of("tiny", upscaling, True, PAIRS)
    chosen = dict.fromkeys(prices.units, (3, 4))
    levels: dict[str, int | str] = dict.fromkeys(prices.units, "w3a4")
    total = count("tiny", upscaling.with_units(levels)).total
    assert prices.total(chosen) == (total.weight_bytes, total.bit_operations)


def test_units_without_quantizers_have_no_bits_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    monkeypatch.setitem(VARIANTS, TINY_EFFICIENTVIT.name, TINY_EFFICIENTVIT)
    weights = tmp_path / "tiny.safetensors"
    sam = insert_quantizers(tiny_efficientvit(), scheme)
    bare = {name for name, unit in model_units(sam) if not any(True for _ in quantizers(unit))}
    assert "image_encoder.norm" in bare
    save_file({k: v.contiguous() for k, v in tiny_efficientvit().state_dict().items()}, weights)
    images, annotations = write_scenes(tmp_path, 1, seed=0)
    pictures = ["--images", images, "--annotations", annotations]
    calibration = ["--calibration-images", images, "--calibration-annotations", annotations]
    output = tmp_path / "mixed.yaml"
    options = ["--bits", 4, 6, "--pictures", 1, "--output", output, "--work-dir", tmp_path / "m"]
    model = ["--model", TINY_EFFICIENTVIT.name, "--checkpoint", weights]
    quick = ["--scheme", SCHEMES / "minmax44.yaml", "--calibration-size", 1, *calibration]
    run("mixed", *model, *quick, *pictures, "--budget", "w4a6", *options)
    chosen = json.loads((tmp_path / "m" / "mixed.json").read_text())["units"]
    assert chosen.keys() == {name for name, _ in model_units(sam)} - bare


def test_what_is_chosen_keeps_the_budget_and_spends_it_on_the_fragile(
    scheme: Scheme, prices: Prices
) -> None:
    budget = read_budget(["w4a4"], "vit_nano", scheme, True)
    assert budget == Budget(*prices.total(dict.fromkeys(prices.units, (4, 4))))
    fragile = "mask_decoder.transformer.final_attn_token_to_image"
    errors = {
        unit: {
            role: {bits: (100 if unit == fragile else 1) * 4.0**-bits for bits in BITS}
            for role in ("weights", "activations")
        }
        for unit in prices.units
    }
    found = choose(scheme, prices, errors, budget)
    assert found.chosen[fragile] == (6, 6)
    assert found.error < sum(
        sum(of_role[4] for of_role in of_unit.values()) for of_unit in errors.values()
    )
    total = count("vit_nano", found.scheme).total
    assert (total.weight_bytes, total.bit_operations) == found.taken
    assert budget.bytes is not None
    assert budget.bit_operations is not None
    assert total.weight_bytes <= budget.bytes
    assert total.bit_operations <= budget.bit_operations
    assert Scheme.from_dict(found.scheme.to_dict()) == found.scheme


def test_budgets_as_people_write_them(scheme: Scheme) -> None:
    def read(*texts: str) -> Budget:
        return read_budget(texts, "vit_nano", scheme, True)

    whole = count("vit_nano").total.float_weight_bytes
    assert read("15%") == Budget(int(whole * 0.15))
    assert read("2MiB", "3MiB", "60GBOP") == Budget(2 * 2**20, 60 * 10**9)
    with pytest.raises(ConfigError, match="asked for a budget of 'small'"):
        read("small")


def test_a_budget_below_the_least_says_what_is_possible(prices: Prices) -> None:
    least = prices.total(dict.fromkeys(prices.units, (3, 3)))
    require_possible(Budget(*least), prices, (3, 3))
    for budget in (Budget(least[0] - 1), Budget(None, least[1] - 1)):
        with pytest.raises(ConfigError, match=r"least possible is .* with all units at W3A3"):
            require_possible(budget, prices, (3, 3))


def test_fewer_bits_never_count_as_better() -> None:
    assert falling({3: 0.5, 4: 0.1, 6: 0.3, 8: 0.0}) == {3: 0.5, 4: 0.3, 6: 0.3, 8: 0.0}


def test_the_command_writes_a_scheme_that_runs(
    tiny_sam: TinySam,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "mixed.yaml"
    options = ["--bits", 3, 4, 6, "--pictures", 1, "--output", output, "--work-dir", tmp_path / "m"]
    run("mixed", *tiny_sam.arguments(), "--budget", "w4a4", *options)
    content = json.loads((tmp_path / "m" / "mixed.json").read_text())
    assert set(content["taken"]) == {"bytes of weights", "bit operations"}
    assert all(content["taken"][name] <= limit for name, limit in content["budget"].items())
    scheme = Scheme.from_yaml(output)
    assert scheme.units
    with monkeypatch.context() as patch:
        # Another budget measures nothing again.
        patch.delattr(study_module.Study, "_picture")
        run("mixed", *tiny_sam.arguments(), "--budget", "w6a6", *options, "--resume")
    assert Scheme.from_yaml(output) != scheme
    fewer = [*map(str, options), "--resume", "--limit", "2"]
    assert main(["mixed", *tiny_sam.arguments(), "--budget", "w6a6", *fewer]) == 2
    assert "pictures differ" in " ".join(capsys.readouterr().err.split())
    output.write_text(scheme.to_yaml())
    model = tmp_path / "model.safetensors"
    work = ["--output", model, "--work-dir", tmp_path / "q"]
    run("quantize", *tiny_sam.arguments(output), *work)
    assert main(["audit", str(model)]) == 0
    assert Scheme.from_yaml(tmp_path / "q" / "scheme.yaml") == scheme
    total = count("tiny", scheme).total
    assert total.weight_bytes == content["taken"]["bytes of weights"]
    assert total.bit_operations == content["taken"]["bit operations"]


def test_a_dry_run_shows_what_is_possible(
    tiny_sam: TinySam, scheme: Scheme, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mixed.yaml"
    options = ["--dry-run", "--bits", 3, 6, "--output", output, "--work-dir", tmp_path / "m"]
    run("mixed", *tiny_sam.arguments(), "--budget", "w4a4", *options)
    least, limit, most = (
        count("tiny", scheme.with_bits(bits, bits)).total.weight_bytes for bits in (3, 4, 6)
    )
    told = capsys.readouterr().out
    assert f"bytes of weights: at most {limit:,}; possible are {least:,} to {most:,}" in told
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "1KiB"], "the least possible is"),
        (["--budget", "tiny"], "write a share of the float weights"),
        (["--budget", "w4a4", "--metric", "logit"], "did you mean 'logits'"),
        (["--budget", "w4a4", "--bits", "4"], "two or more of 2 to 16"),
        (
            ["--budget", "w4a4", "--scheme-options", "units={image_encoder.neck: 8}"],
            "without `units`",
        ),
        (
            ["--budget", "w4a4", "--scheme-options", "slots={softmax: {bit: 6}}"],
            "give them without `bit`",
        ),
    ],
)
def test_bad_input(
    tiny_sam: TinySam,
    options: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = ["--output", str(tmp_path / "s.yaml"), "--work-dir", str(tmp_path / "m")]
    two = ["--bits", "4", "8"]
    assert main(["mixed", *tiny_sam.arguments(), *two, *options, *output]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
