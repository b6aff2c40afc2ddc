from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ptq4sam.errors import ConfigError
from ptq4sam.extensions import EXTENSIONS
from ptq4sam.families import VARIANTS
from ptq4sam.sweep.grid import Sweep, read_sweep, shown
from ptq4sam.sweep.tasks import calibration_key, calibration_scheme

ROOT = Path(__file__).resolve().parents[2]
SCHEME = str(ROOT / "exp" / "ptq4sam-l44.yaml")


def read(tmp_path: Path, content: object, **overrides: object) -> Sweep:
    path = tmp_path / "mine.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return read_sweep(path, overrides)


def names(sweep: Sweep) -> list[str]:
    return [trial.name for trial in sweep.trials]


def test_every_combination_in_the_order_of_the_file(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        {
            "base": {"scheme": SCHEME, "steps": 50},
            "grid": {"scheme.ptq4sam.BIG": [False, True], "seed": [0, 1]},
        },
    )
    assert (sweep.name, sweep.axes) == ("mine", ["scheme.ptq4sam.BIG", "seed"])
    assert names(sweep) == [f"BIG={b}, seed={s}" for b in ("off", "on") for s in (0, 1)]
    schemes = [trial.settings.scheme for trial in sweep.trials]
    assert [scheme.ptq4sam.BIG for scheme in schemes] == [False, False, True, True]
    # 20,000 steps are 50 now, with the rates that such a short schedule gets.
    assert {(s.recon.iters, s.recon.rounding_lr) for s in schemes if s.recon} == {(50, 0.1)}
    assert len({trial.key for trial in sweep.trials}) == 4


def test_values_with_names_exclusions_and_inclusions(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        {
            "base": {"scheme": SCHEME},
            "grid": {
                "width": {
                    "W4A4": {"bits": 4},
                    "W4A8": {"scheme.w_qconfig.bit": 4, "scheme.a_qconfig.bit": 8},
                },
                "seed": [0, 1],
            },
            "exclude": [{"width": "W4A8", "seed": 1}],
            "include": [{"seed": 7, "scheme": str(ROOT / "exp" / "minmax66.yaml")}],
        },
    )
    assert names(sweep)[:3] == ["width=W4A4, seed=0", "width=W4A4, seed=1", "width=W4A8, seed=0"]
    assert len(sweep.trials) == 4
    widths = [
        (trial.settings.scheme.w_qconfig.bit, trial.settings.scheme.a_qconfig.bit)
        for trial in sweep.trials
    ]
    assert widths == [(4, 4), (4, 4), (4, 8), (6, 6)]
    assert sweep.trials[-1].settings.seed == 7


def test_methods_are_told_apart(tmp_path: Path) -> None:
    methods = [[], {"key-centring": {}, "bimodal-integration": {"beta": 0.5}}]
    with pytest.raises(ConfigError):  # what is shown is not what is read
        read(tmp_path, {"base": {"scheme": SCHEME}, "grid": {"scheme.methods": ["none"]}})
    assert [shown(value) for value in methods] == [
        "none",
        "key-centring()/bimodal-integration(beta=0.5)",
    ]


@pytest.mark.parametrize("methods", [["mac", {"pcc": None}], {"mac": None, "pcc": {"share": 0.1}}])
def test_a_setting_of_a_method_is_an_axis(tmp_path: Path, methods: object) -> None:
    base = {"scheme": str(ROOT / "exp" / "minmax44.yaml"), "scheme.methods": methods}
    key = "scheme.methods.pcc.share"
    content = {"base": base, "grid": {key: [0.9, 0.5], "seed": [0]}}
    sweep = read(tmp_path, content)
    assert names(sweep) == [f"methods.pcc.share={share}, seed=0" for share in (0.9, 0.5)]
    found = [trial.settings.scheme.to_dict()["methods"] for trial in sweep.trials]
    assert [list(one) for one in found] == [["mac", "pcc"]] * 2
    assert [one["pcc"]["share"] for one in found] == [0.9, 0.5]
    assert len({trial.key for trial in sweep.trials}) == 2
    (alone,) = read(tmp_path, {"base": base, "grid": {"seed": [1]}}, **{key: 0.3}).trials
    assert alone.settings.scheme.to_dict()["methods"]["pcc"]["share"] == 0.3


def test_a_trial_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    """A scheme that is written out in the file is not that of the trial before."""
    scheme = yaml.safe_load((ROOT / "exp" / "minmax44.yaml").read_text())
    content = {"base": {"scheme": scheme}, "grid": {"scheme.calibrate": [3, 5]}}
    sweep = read(tmp_path, {**content, "include": [{"seed": 9}]})
    assert [t.settings.scheme.calibrate for t in sweep.trials] == [3, 5, 32]


def test_two_ways_to_say_the_same_are_one_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = read(
        tmp_path,
        {
            "base": {"scheme": SCHEME},
            "grid": {"bits": [4]},
            "include": [{"scheme.w_qconfig.bit": 4}],
        },
    )
    assert names(sweep) == ["bits=4"]
    assert "is the same as bits=4" in caplog.text


def test_overrides_go_before_base_and_the_grid_before_overrides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"base": {"scheme": SCHEME, "limit": 3, "steps": 9}, "grid": {"steps": [1, 2]}}
    sweep = read(tmp_path, content, limit=5, steps=4)
    assert [trial.settings.limit for trial in sweep.trials] == [5, 5]
    assert [t.settings.scheme.recon.iters for t in sweep.trials if t.settings.scheme.recon] == [
        1,
        2,
    ]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "steps=4 was asked for, but the grid has values of its own"


BASE = f"base: {{scheme: {SCHEME}}}\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (BASE + "grid: {sede: [1]}", "grid.sede: unknown key; did you mean 'seed'?"),
        (BASE + "grid: {BIG: [true]}", "grid.BIG: unknown key; did you mean 'scheme.ptq4sam.BIG'"),
        (BASE + "grid: {recon.itters: [1]}", "did you mean 'scheme.recon.iters'?"),
        (BASE + "grid: {methods.pcc.share: [1]}", "did you mean 'scheme.methods.pcc.share'?"),
        (
            BASE + "grid: {scheme.methods.pcc.share: [0.9]}",
            "trial methods.pcc.share=0.9: scheme.methods.pcc.share: the scheme has no method "
            "'pcc', it has none: give it whole, as methods.pcc={share: 0.9}",
        ),
        (BASE + "grid: {scheme.recon.itters: [1]}", "did you mean 'scheme.recon.iters'?"),
        (BASE + "grids: {seed: [1]}", "grids: unknown key; did you mean 'grid'?"),
        ("base: {shceme: x}\ngrid: {seed: [1]}", "base.shceme: unknown key; did you mean 'scheme'"),
        (BASE + "grid: {seed: [1]}\nexclude: [{seeds: 1}]", "exclude.seeds: unknown key; did you"),
        (BASE + "grid: {seed: [1]}\ninclude: [{limt: 1}]", "include.limt: unknown key; did you"),
        (BASE + "grid: {w: {a: {bitts: 4}}}", "grid.w.a.bitts: unknown key; did you mean 'bits'?"),
        (BASE + "grid: {bits: [99]}", "trial bits=99: bit: 99 given, allowed: 2 to 16"),
        (BASE + "grid: {model: [vit_x]}", "'vit_x' given, allowed: vit_b, vit_l, vit_h, vit_nano"),
        (BASE + "grid: {scheme.ptq4sam.taus: [[3]]}", "allowed: some of 1, 2, 4, each once"),
        (BASE + "grid: {data: [{images: a, annotations: b}]}", "calibration: missing"),
        ("grid: {scheme.recon.iters: [1]}", "name a file in base"),
        ("grid: {seed: [1]}", "scheme: missing"),
        ("base: {scheme: no-such.yaml}\ngrid: {seed: [1]}", "no such scheme file"),
        (BASE, "no trial is left"),
        ("", "no trial is left"),
        (BASE + "grid: {seed: []}", "grid.seed: no value is given, so that there is no trial"),
        (BASE + "grid: {seed: [1]}\nexclude: [{seed: 1}]", "no trial is left"),
        (BASE + "grid: [1]", "grid: [1] given, keys and values are needed"),
        (BASE + "grid: {seed: [1, 2}", "not YAML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


TRIALS = {
    "bimodal": 12,
    "bits": 24,
    "calibration": 16,
    "drop": 10,
    "methods": 69,
    "methods-l": 72,
    "published": 48,
    "seeds": 8,
    "steps": 5,
    "tinysam": 24,
    "taus": 7,
    "two-peaks": 24,
    "efficientvit": 8,
    "units": 4,
}


@pytest.mark.parametrize("name", TRIALS)
def test_sweeps_that_ship_run_on_what_ships(name: str) -> None:
    sweep = read_sweep(ROOT / "exp" / "sweeps" / f"{name}.yaml")
    assert len(sweep.trials) == TRIALS[name]
    for trial in sweep.trials:
        settings = trial.settings
        assert VARIANTS[settings.model].weights.embedded is not None
        assert (settings.checkpoint, settings.data) == (None, None)


def test_trials_and_calibrations_follow_the_files_of_extensions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_sweep(ROOT / "exp" / "sweeps" / "units.yaml").trials[0].settings
    mine = tmp_path / "mine.py"
    found = [(settings.key(), calibration_key(settings))]
    monkeypatch.setenv(EXTENSIONS, str(mine))
    for text in ("rate = 1\n", "rate = 2\n"):
        mine.write_text(text)
        found.append((settings.key(), calibration_key(settings)))
    trials, calibrations = zip(*found, strict=True)
    assert len(set(trials)) == len(set(calibrations)) == 3


def test_the_order_of_methods_and_of_units_tells_trials_apart(tmp_path: Path) -> None:
    orders = [["aqer", "mac"], ["mac", "aqer"]]
    attention, encoder = "image_encoder.blocks.0.attn", "image_encoder"
    units = [{attention: 8, encoder: 6}, {encoder: 6, attention: 8}]
    for key, values in (("scheme.methods", orders), ("scheme.units", units)):
        base = {"scheme": str(ROOT / "exp" / "ptq4sam-s44.yaml")}
        sweep = read(tmp_path, {"base": base, "grid": {key: values}})
        settings = [trial.settings for trial in sweep.trials]
        assert len({one.key() for one in settings}) == 2
        assert len({calibration_key(one) for one in settings}) == 2


def test_a_study_is_calibrated_as_one(tmp_path: Path) -> None:
    """Its operators observe what those of other schemes do not have; published defects do not."""
    base = {"scheme": str(ROOT / "exp" / "ptq4sam-s44.yaml")}
    compat = ["faithful", "published", "study"]
    sweep = read(tmp_path, {"base": base, "grid": {"scheme.compat": compat}})
    settings = [trial.settings for trial in sweep.trials]
    assert [calibration_scheme(one.scheme).compat for one in settings] == [
        "faithful",
        "faithful",
        "study",
    ]
    assert len({calibration_key(one) for one in settings}) == 2


def test_seeds_share_a_calibration_unless_they_draw_its_pictures(tmp_path: Path) -> None:
    scheme = ROOT / "exp" / "ptq4sam-s44.yaml"
    for order, calibrations in (("file", 1), ("random", 3)):
        file = tmp_path / f"{order}.yaml"
        base = f"{{scheme: {scheme}, scheme.calibrate_order: {order}}}"
        file.write_text(f"base: {base}\ngrid: {{seed: [0, 1, 2]}}\n")
        trials = read_sweep(file).trials
        assert len({calibration_key(trial.settings) for trial in trials}) == calibrations


def test_every_sweep_file_is_tested() -> None:
    assert {path.stem for path in (ROOT / "exp" / "sweeps").glob("*")} == set(TRIALS)


def test_what_the_sweeps_are_about() -> None:
    def values(name: str, key: str) -> list[object]:
        trials = read_sweep(ROOT / "exp" / "sweeps" / f"{name}.yaml").trials
        return list(dict.fromkeys(str(trial.values.get(key)) for trial in trials))

    assert values("bits", "bits") == ["3", "4", "5", "6", "7", "8"]
    assert values("calibration", "scheme.calibrate")[::7] == ["1", "128"]
    assert values("units", "scheme.recon.granularity") == ["layer", "unit"]
    assert "0" in values("drop", "scheme.recon.drop_prob")
    assert "[1, 2, 4]" in values("taus", "scheme.ptq4sam.taus")
    assert values("bimodal", "seed") == ["0", "1", "2"]
