"""Schemes: the published keys are read, and every mistake becomes one clear line."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptq4sam.errors import ConfigError
from ptq4sam.quantization.formats import PER_TENSOR_OBSERVER_NAMES, TensorFormat
from ptq4sam.quantization.levels import bits_of_level
from ptq4sam.quantization.published import Methods
from ptq4sam.quantization.recon import Reconstruction
from ptq4sam.quantization.scheme import Scheme

PUBLISHED = """
a_qconfig: {quantizer: LSQFakeQuantize, observer: AvgMinMaxObserver, bit: 4, symmetric: False,
    ch_axis: -1}
w_qconfig: {quantizer: AdaRoundFakeQuantize, observer: MSEObserver, bit: 4, symmetric: False,
    ch_axis: 0}
calibrate: 32
recon: {batch_size: 1, scale_lr: 4.0e-5, warm_up: 0.2, weight: 0.01, iters: 20000,
    b_range: [20, 2], keep_gpu: True, round_mode: learned_hard_sigmoid, drop_prob: 0.5}
ptq4sam: {BIG: True, AGQ: True, global_num: 128, peak_distance: 32, peak_height: 0.01}
"""


def published() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(PUBLISHED))


def changed(key: str, value: object) -> dict[str, Any]:
    mapping = published()
    *outer, last = key.split(".")
    target = mapping
    for part in outer:
        target = target[part]
    target[last] = value
    return mapping


def test_published_file_gives_the_published_settings(tmp_path: Path) -> None:
    path = tmp_path / "config44.yaml"
    path.write_text(PUBLISHED)
    scheme = Scheme.from_yaml(path)
    assert scheme.a_qconfig == TensorFormat("LSQFakeQuantize", "AvgMinMaxObserver", 4, False, -1)
    assert scheme.w_qconfig == TensorFormat("AdaRoundFakeQuantize", "MSEObserver", 4, False, 0)
    assert scheme.calibrate == 32
    assert scheme.ptq4sam == Methods(True, True, 128, 32, 0.01)
    assert scheme.compat == "faithful"
    recon = scheme.recon
    assert recon is not None
    assert (recon.iters, recon.warm_up, recon.weight, recon.b_range) == (20000, 0.2, 0.01, (20, 2))
    assert (recon.scale_lr, recon.rounding_lr, recon.drop_prob) == (4e-5, 1e-3, 0.5)
    assert recon.learn_rounding
    assert recon.learn_scale
    assert (recon.granularity, recon.weights_only) == ("unit", False)


def test_defaults_are_those_of_the_published_file() -> None:
    scheme = Scheme.from_dict(published())
    assert Reconstruction() == scheme.recon
    assert Methods(BIG=True, AGQ=True) == scheme.ptq4sam


def test_no_recon_section_is_statistics_only_and_no_ptq4sam_section_is_off() -> None:
    mapping = published()
    del mapping["recon"], mapping["ptq4sam"]
    scheme = Scheme.from_dict(mapping)
    assert scheme.recon is None
    assert not scheme.ptq4sam.BIG
    assert not scheme.ptq4sam.AGQ


@pytest.mark.parametrize("text", ["4e-5", "4E-5", "0.00004"])
def test_numbers_that_yaml_takes_for_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scheme.yaml"
    path.write_text(PUBLISHED.replace("4.0e-5", text))
    scheme = Scheme.from_yaml(path)
    assert scheme.recon is not None
    assert scheme.recon.scale_lr == 4e-5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("a_qconfig.bitt", 4, "a_qconfig.bitt: unknown key; did you mean 'bit'?"),
        ("recon.iter", 4, "recon.iter: unknown key; did you mean 'iters'?"),
        ("recom", {}, "recom: unknown key; did you mean 'recon'?"),
        ("ptq4sam.zzz", 1, "ptq4sam.zzz: unknown key; known are BIG, AGQ, global_num,"),
        ("a_qconfig.bit", "four", "a_qconfig.bit: 'four' given, an integer is needed"),
        ("a_qconfig.bit", True, "a_qconfig.bit: True given, an integer is needed"),
        ("a_qconfig.bit", 4.0, "a_qconfig.bit: 4.0 given, an integer is needed"),
        ("a_qconfig.bit", 1, "a_qconfig.bit: 1 given, allowed: 2 to 16"),
        ("w_qconfig.bit", 17, "w_qconfig.bit: 17 given, allowed: 2 to 16"),
        ("w_qconfig.symmetric", 0, "w_qconfig.symmetric: 0 given, true or false is needed"),
        ("w_qconfig.ch_axis", 2, "w_qconfig.ch_axis: 2 given, allowed: -1"),
        ("w_qconfig.ch_axis", 1, "w_qconfig.granularity: 'per head' given for weight, which is"),
        ("w_qconfig", 4, "w_qconfig: 4 given, keys and values are needed"),
        ("w_qconfig", None, "w_qconfig: None given, keys and values are needed"),
        ("w_qconfig.observer", "MSEObservr", "w_qconfig.observer: 'MSEObservr' given; did you"),
        ("w_qconfig.observer", "x", "w_qconfig.observer: 'x' given; allowed: MinMaxObserver,"),
        ("w_qconfig.observer", "AvgMinMaxObserver", "w_qconfig.observer: AvgMinMaxObserver works"),
        ("a_qconfig.quantizer", "AdaRoundFakeQuantize", "a_qconfig.quantizer: AdaRoundFakeQ"),
        ("a_qconfig.quantizer", "LSQ", "a_qconfig.quantizer: 'LSQ' given; "),
        ("calibrate", 0, "calibrate: 0 given, allowed: 1 or more"),
        (
            "compat",
            "Published",
            "compat: 'Published' given, one of faithful, published, study is needed",
        ),
        ("recon.batch_size", 0, "recon.batch_size: 0 given, allowed: 1 or more"),
        ("recon.iters", 0, "recon.iters: 0 given, allowed: 1 or more"),
        ("recon.warm_up", 1, "recon.warm_up: 1.0 given, allowed: 0 to below 1"),
        ("recon.warm_up", -0.1, "recon.warm_up: -0.1 given, allowed: 0 to below 1"),
        ("recon.drop_prob", 1.0, "recon.drop_prob: 1.0 given, allowed: 0 to below 1"),
        ("recon.scale_lr", 0, "recon.scale_lr: 0.0 given, allowed: more than 0"),
        ("recon.scale_lr", float("nan"), "recon.scale_lr: nan given, a number is needed"),
        ("recon.weight", -1, "recon.weight: -1.0 given, allowed: 0 or more"),
        ("recon.b_range", [2, 20], "recon.b_range: (2.0, 20.0) given, allowed: [start, end]"),
        ("recon.b_range", [20], "recon.b_range: [20] given, a list of 2 items is needed"),
        ("recon.b_range", [20, "x"], "recon.b_range: 'x' given, a number is needed"),
        ("recon.round_mode", "stochastic", "recon.round_mode: 'stochastic' given, one of"),
        (
            "recon.granularity",
            "block",
            "recon.granularity: 'block' given, one of unit, layer, joint",
        ),
        ("ptq4sam.peak_distance", 129, "ptq4sam.peak_distance: 129 given, allowed: 1 to global"),
        ("ptq4sam.peak_height", 0, "ptq4sam.peak_height: 0.0 given, allowed: between 0 and 1"),
        ("ptq4sam.global_num", 2, "ptq4sam.global_num: 2 given, allowed: 3 or more"),
    ],
)
def test_a_mistake_is_one_line_naming_key_and_file(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Scheme.from_dict(changed(key, value), "exp/mine.yaml")
    assert str(caught.value).startswith(f"exp/mine.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_missing_key() -> None:
    mapping = published()
    del mapping["a_qconfig"]["bit"]
    with pytest.raises(ConfigError, match=r"^a_qconfig\.bit: missing; an integer is needed$"):
        Scheme.from_dict(mapping)


def test_learning_needs_something_that_learns() -> None:
    with pytest.raises(ConfigError, match=r"^recon\.learn_rounding: needs .* AdaRoundFakeQuantize"):
        Scheme.from_dict(changed("w_qconfig.quantizer", "FixedFakeQuantize"))
    with pytest.raises(ConfigError, match=r"^recon\.learn_scale: needs .* LSQFakeQuantize"):
        Scheme.from_dict(changed("a_qconfig.quantizer", "FixedFakeQuantize"))
    with pytest.raises(ConfigError, match="nothing to learn"):
        Reconstruction(learn_rounding=False, learn_scale=False)


def test_weights_only_neither_learns_scales_nor_drops() -> None:
    recon = Reconstruction(weights_only=True)
    assert not recon.learn_scale
    assert recon.drop_prob == 0
    fixed = changed("a_qconfig.quantizer", "FixedFakeQuantize")
    fixed["recon"]["weights_only"] = True
    assert Scheme.from_dict(fixed).recon is not None


def test_a_record_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^bit: 40 given, allowed: 2 to 16$"):
        TensorFormat("LSQFakeQuantize", "MSEObserver", 40)


def test_a_scheme_cannot_be_changed() -> None:
    scheme = Scheme.from_dict(published())
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.calibrate = 1  # type: ignore[misc]


def test_yaml_and_dict_read_back_to_an_equal_scheme(tmp_path: Path) -> None:
    scheme = Scheme.from_dict(published()).with_overrides("recon.granularity=layer")
    path = tmp_path / "scheme.yaml"
    path.write_text(scheme.to_yaml())
    assert Scheme.from_yaml(path) == scheme
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_overrides() -> None:
    scheme = Scheme.from_dict(published())
    other = scheme.with_overrides("recon.iters=500", "a_qconfig.bit = 6", "recon.b_range=[10, 1]")
    assert other.recon == Reconstruction(iters=500, b_range=(10, 1))
    assert other.a_qconfig.bit == 6
    assert scheme.recon == Reconstruction()
    assert scheme.with_overrides() == scheme
    statistics = scheme.with_overrides("recon=null")
    assert statistics.recon is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("recon.iter=5", "recon.iter: unknown key; did you mean 'iters'?"),
        ("reco.iters=5", "reco: unknown key; did you mean 'recon'?"),
        ("recon.iters=many", "recon.iters: 'many' given, an integer is needed"),
        ("recon.iters", "write it as key=value"),
        ("=5", "write it as key=value"),
        ("recon..iters=5", "write it as key=value"),
        ("calibrate.x=5", "calibrate: 32 has no field 'x' to set"),
        ("recon.b_range=[1", "the value is not YAML"),
        (
            "methods.pcc.share=0.3",
            "no method 'pcc', it has none: give it whole, as methods.pcc={share: 0.3}",
        ),
    ],
)
def test_impossible_overrides(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Scheme.from_dict(published()).with_overrides(assignment)
    assert message in str(caught.value)
    assert str(caught.value).startswith("override ")
    assert assignment in str(caught.value)


@pytest.mark.parametrize("methods", ["[mac, pcc]", "{mac: , pcc: }", "[mac, {pcc: {share: 0.9}}]"])
def test_a_setting_of_a_method_is_a_key(methods: str) -> None:
    scheme = Scheme.from_dict(published()).with_overrides(
        f"methods={methods}", "methods.pcc.share=0.3"
    )
    assert list(scheme.to_dict()["methods"]) == ["mac", "pcc"]
    assert scheme.to_dict()["methods"]["pcc"]["share"] == 0.3
    again = scheme.with_overrides("methods.pcc.share=0.25").to_dict()
    assert again["methods"]["pcc"]["share"] == 0.25
    with pytest.raises(ConfigError, match=r"methods\.pcc\.shar: unknown key; did you mean 'share'"):
        scheme.with_overrides("methods.pcc.shar=0.3")
    with pytest.raises(ConfigError, match=r"no method 'pc', it has mac, pcc: give it whole"):
        scheme.with_overrides("methods.pc.share=0.3")


def test_override_of_an_absent_section_says_so() -> None:
    scheme = Scheme.from_dict(published()).with_overrides("recon=null")
    with pytest.raises(ConfigError, match=r"recon: there is no such section.*'iters'"):
        scheme.with_overrides("recon.iters=5")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "config44.yaml").write_text(PUBLISHED)
    with pytest.raises(ConfigError, match=r"no such scheme file; did you mean .*config44\.yaml\?"):
        Scheme.from_yaml(tmp_path / "config4.yaml")
    with pytest.raises(ConfigError, match=r"no such scheme file$"):
        Scheme.from_yaml(tmp_path / "nowhere" / "config44.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Scheme.from_yaml(tmp_path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml:2: not YAML"):
        Scheme.from_yaml(broken)
    broken.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        Scheme.from_yaml(broken)
    broken.write_text("")
    with pytest.raises(ConfigError, match="None given, keys and values are needed"):
        Scheme.from_yaml(broken)


def test_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(PUBLISHED + "calibrate: 16\n")
    with pytest.raises(ConfigError, match="key 'calibrate' is given twice"):
        Scheme.from_yaml(path)


def test_known_names_are_those_of_the_registries() -> None:
    from ptq4sam.quantization.observers import OBSERVERS
    from ptq4sam.quantization.quantizers import QUANTIZERS

    assert set(OBSERVERS.names) == set(OBSERVERS)
    assert set(QUANTIZERS.names) == set(QUANTIZERS)


def test_observers_refuse_channels_exactly_where_schemes_do() -> None:
    from ptq4sam.quantization.grid import Grid
    from ptq4sam.quantization.observers import OBSERVERS

    refusing = []
    for name, observer in OBSERVERS.items():
        try:
            observer(Grid(4), 0)
        except ConfigError:
            refusing.append(name)
    assert set(refusing) == set(PER_TENSOR_OBSERVER_NAMES)


def test_reading_a_scheme_needs_no_torch() -> None:
    code = "import sys, ptq4sam.quantization.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EXP = Path(__file__).resolve().parents[2] / "exp"


@pytest.mark.parametrize(("steps", "raised"), [(20_000, 1), (500, 40), (200, 100), (20, 100)])
def test_fewer_steps_learn_faster(steps: int, raised: float) -> None:
    scheme = Scheme.from_yaml(EXP / "ptq4sam-l44.yaml").with_steps(steps)
    assert scheme.recon is not None
    assert scheme.recon.iters == steps
    assert scheme.recon.scale_lr == pytest.approx(4e-5 * raised)
    assert scheme.recon.rounding_lr == pytest.approx(1e-3 * raised)


def test_a_scheme_without_reconstruction_has_no_steps() -> None:
    without = Scheme.from_yaml(EXP / "ptq4sam-s44.yaml")
    assert without.with_steps(200) == without


@pytest.mark.parametrize(
    ("level", "bits"), [(8, (8, 8)), ("w4a6", (4, 6)), ("w3a16", (3, 16)), ("float", None)]
)
def test_units_have_bits_of_weights_and_activations(
    level: int | str, bits: tuple[int, int] | None
) -> None:
    scheme = Scheme.from_dict(yaml.safe_load(PUBLISHED)).with_units({"image_encoder.neck": level})
    unit = scheme.of_unit("image_encoder.neck")
    found = None if unit is None else (unit.w_qconfig.bit, unit.a_qconfig.bit)
    assert found == bits == bits_of_level(level)
    assert Scheme.from_dict(yaml.safe_load(scheme.to_yaml())) == scheme


@pytest.mark.parametrize("level", ["w4", "a4", "w4a", "4", "w17a4", 1])
def test_other_levels_of_units_are_refused(level: int | str) -> None:
    scheme = Scheme.from_dict(yaml.safe_load(PUBLISHED))
    with pytest.raises(ConfigError, match="allowed: 2 to 16, both apart as w4a8, or float"):
        scheme.with_units({"image_encoder.neck": level})


def test_methods_with_settings_in_a_list() -> None:
    settings = {"pcc": {"metric": "hessian"}}
    listed = Scheme.from_dict(changed("methods", ["key-centring", settings]))
    assert listed == Scheme.from_dict(changed("methods", {"key-centring": {}, **settings}))
    for given in ({"a": 1, "b": 2}, 3, ["pcc"]):
        with pytest.raises(ConfigError, match="names or name: settings"):
            Scheme.from_dict(changed("methods", [given]))
