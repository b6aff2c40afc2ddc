"""What a scheme says of single kinds of slots, and of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ptq4sam.errors import ConfigError
from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.assignment import make_quantizer
from ptq4sam.methods.hybrid import Hybrid, HybridQuantizer
from ptq4sam.methods.method import Calibration, Method
from ptq4sam.quantization.affine import AffineQuantizer
from ptq4sam.quantization.published import BIMODAL, BimodalIntegration
from ptq4sam.quantization.quantizers import FixedQuantizer, LSQQuantizer, Quantizer
from ptq4sam.quantization.registry import METHODS
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.quantization.slots import HEADS
from ptq4sam.records import Record
from tests.tiny_runs import SCHEMES


def scheme_with(*overrides: str) -> Scheme:
    return Scheme.from_yaml(SCHEMES / "minmax44.yaml").with_overrides(*overrides)


def made(scheme: Scheme, slot: str, *roles: str) -> Quantizer:
    return make_quantizer(scheme, slot, frozenset(roles))


def test_the_selector_with_most_roles_counts() -> None:
    scheme = scheme_with(
        "slots={input: {bit: 6}, input@decoder: {bit: 7}, input@decoder@after-relu: {grid: hybrid}}"
    )
    assert made(scheme, "input", "encoder", "after-gelu").grid.bits == 6
    assert made(scheme, "input", "decoder").grid.bits == 7
    behind = made(scheme, "input", "decoder", "after-relu")
    assert isinstance(behind, HybridQuantizer)
    # Bits of the scheme where the format has none.
    assert behind.grid.bits == scheme.a_qconfig.bit
    assert made(scheme, "key", "decoder").grid.bits == scheme.a_qconfig.bit
    # Of as many roles the last one.
    both = scheme_with("slots={input@decoder: {bit: 7}, input@after-relu: {bit: 5}}")
    assert made(both, "input", "decoder", "after-relu").grid.bits == 5


def test_an_affine_format_differs_in_what_is_said() -> None:
    scheme = scheme_with(
        "slots={key: {observer: MSEObserver, quantizer: FixedFakeQuantize}, weight: {bit: 3}}"
    )
    key, value = made(scheme, "key", "decoder"), made(scheme, "value", "decoder")
    assert isinstance(key, FixedQuantizer)
    assert type(key.observer).__name__ == "MSEObserver"
    assert isinstance(value, AffineQuantizer)
    assert type(value.observer).__name__ == scheme.a_qconfig.observer
    weight = made(scheme, "weight", "encoder")
    assert isinstance(weight, AffineQuantizer)
    assert (weight.grid.bits, weight.channel_axis) == (3, 0)


def test_a_unit_with_bits_of_its_own_has_them_in_every_slot() -> None:
    scheme = scheme_with(
        "slots={input: {bit: 3}, softmax: {grid: hybrid, bit: 5}}", "units={a.mlp: w4a8}"
    )
    unit = scheme.of_unit("a.mlp")
    assert unit is not None
    assert [made(unit, slot).grid.bits for slot in ("input", "softmax", "weight")] == [8, 8, 4]
    assert isinstance(made(unit, "softmax"), HybridQuantizer)
    other = scheme.of_unit("b.mlp")
    assert other is not None
    assert [made(other, slot).grid.bits for slot in ("input", "softmax")] == [3, 5]


@pytest.mark.parametrize(("agq", "selector"), [("true", "softmax"), ("decoder", "softmax@decoder")])
def test_the_published_key_of_adaptive_granularity_means_a_logarithmic_grid(
    agq: str, selector: str
) -> None:
    published = scheme_with(f"ptq4sam={{AGQ: {agq}, taus: [2], exact: true}}")
    ours = scheme_with(f"slots={{{selector}: {{grid: logarithmic, taus: [2], exact: true}}}}")
    for scheme in (published, ours):
        decoder, encoder = made(scheme, "softmax", "decoder"), made(scheme, "softmax", "encoder")
        assert isinstance(decoder, AdaptiveGranularityQuantizer)
        assert (decoder._exact, decoder._taus) == (True, (2,))
        assert isinstance(encoder, AdaptiveGranularityQuantizer) == (agq == "true")


def test_the_published_key_of_bimodal_integration_means_a_method() -> None:
    published = scheme_with("ptq4sam={BIG: true, peak_height: 0.02}")
    ours = scheme_with("methods={bimodal-integration: {peak_height: 0.02}}")
    for scheme in (published, ours):
        assert scheme.method_settings == {BIMODAL: BimodalIntegration(peak_height=0.02)}
        key, other = made(scheme, "key", "decoder"), made(scheme, "key", "encoder")
        assert isinstance(key, AffineQuantizer)
        assert isinstance(other, AffineQuantizer)
        assert type(key.observer).__name__ == "AvgMSEFastObserver"
        assert type(other.observer).__name__ == scheme.a_qconfig.observer
    # What a scheme itself says of the slot goes before.
    scheme = published.with_overrides("slots={key@decoder: {observer: MSEObserver}}")
    key = made(scheme, "key", "decoder")
    assert isinstance(key, AffineQuantizer)
    assert type(key.observer).__name__ == "MSEObserver"


def test_a_scheme_with_slots_is_read_back(tmp_path: Path) -> None:
    scheme = scheme_with(
        "slots={input@after-gelu: {grid: hybrid, knee_rates: [0.3]}, value: {bit: 6}}",
        "methods=[bimodal-integration]",
    )
    path = tmp_path / "scheme.yaml"
    path.write_text(scheme.to_yaml())
    assert Scheme.from_yaml(path) == scheme
    assert scheme.slot_formats["input@after-gelu"].settings == Hybrid(knee_rates=(0.3,))
    changed = scheme.with_overrides(
        "slots.value.bit=5", "methods.bimodal-integration.peak_height=0.5"
    )
    assert made(changed, "value").grid.bits == 5
    assert changed.method_settings[BIMODAL] == BimodalIntegration(peak_height=0.5)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("slots={inputs: {bit: 4}}", "slots.inputs: unknown key; did you mean 'input'?"),
        ("slots={input: {grid: hybird}}", "slots.input.grid: 'hybird' given; did you mean 'hybrid"),
        ("slots={input: {bit: 40}}", "slots.input.bit: 40 given, allowed: 2 to 16"),
        ("slots={key: {granularity: per channel}}", "slots.key.ch_axis: activations are quantized"),
        ("slots={weight: {grid: hybrid}}", "slots.weight.grid: .hybrid. given, which is for input"),
        (
            "slots={input@after-relu: {grid: logarithmic}}",
            "slots.input@after-relu.grid: .logarithmic. given, which is for softmax",
        ),
        (
            "slots={input: {quantizer: AdaRoundFakeQuantize}}",
            "slots.input.quantizer: AdaRoundFakeQuantize is for weights; allowed: Fixed",
        ),
        ("slots={input: 4}", "slots.input: 4 given, keys and values are needed"),
        (
            "slots={input: {grid: hybrid, knee_rate: [0.1]}}",
            "slots.input.knee_rate: unknown key; did you mean 'knee_rates'?",
        ),
        (
            "slots={softmax: {grid: logarithmic, taus: [3]}}",
            "slots.softmax.taus: .* allowed: some of 1, 2, 4",
        ),
        ("slots={key: {observer: MinMax}}", "observer: 'MinMax' given; did you mean 'MinMaxObs"),
        (
            "methods=[bimodal-integr]",
            "methods: 'bimodal-integr' given; did you mean 'bimodal-integration'?",
        ),
        (
            "methods={bimodal-integration: {peak_hight: 0.1}}",
            "methods.bimodal-integration.peak_hight: unknown key; did you mean 'peak_height'?",
        ),
        (
            "methods={bimodal-integration: {peak_height: 2}}",
            "methods.bimodal-integration.peak_height: 2.0 given, allowed: between 0 and 1",
        ),
    ],
)
def test_what_is_not_there_is_an_error_with_the_nearest(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        scheme_with(override)


@dataclass(frozen=True)
class Doubling(Record):
    factor: float = 2.0


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> type[Method[Doubling]]:
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))

    @METHODS.register("doubling")
    class _Doubling(Method[Doubling]):
        settings_type = Doubling

        def after_ranges(self, calibration: Calibration) -> Sequence[str]:
            return [str(calibration)]

    return _Doubling


def test_a_method_of_ones_own_has_settings(doubling: type[Method[Doubling]]) -> None:
    assert scheme_with("methods=[doubling]").method_settings == {"doubling": Doubling()}
    given = scheme_with("methods={doubling: {factor: 3}}", "ptq4sam={BIG: true}")
    assert list(given.method_settings) == [BIMODAL, "doubling"]
    assert given.method_settings["doubling"] == Doubling(3.0)
    with pytest.raises(ConfigError, match=r"methods\.doubling\.factr: unknown .* 'factor'"):
        scheme_with("methods={doubling: {factr: 3}}")


def test_settings_of_a_method_that_has_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="methods: key-centring has no settings, share given: "):
        scheme_with("methods={key-centring: {share: 1}}")
    scheme = scheme_with("methods=[key-centring]")
    assert replace(scheme, calibrate=2).method_settings == scheme.method_settings


def test_granularity_is_another_way_to_write_ch_axis() -> None:
    one = scheme_with("w_qconfig.granularity=per tensor")
    assert one.w_qconfig.ch_axis == -1
    assert one == scheme_with("w_qconfig.ch_axis=-1")
    assert one.with_overrides("w_qconfig.granularity=per channel").w_qconfig.ch_axis == 0
    assert one.with_overrides("w_qconfig.ch_axis=0").w_qconfig.ch_axis == 0
    weight = made(scheme_with("slots={weight: {granularity: per tensor}}"), "weight", "encoder")
    assert isinstance(weight, AffineQuantizer)
    assert weight.channel_axis is None
    with pytest.raises(ConfigError, match="granularity: 'per row' given, allowed: per ten"):
        scheme_with("w_qconfig.granularity=per row")
    with pytest.raises(ConfigError, match="activations are quantized per tensor"):
        scheme_with("a_qconfig.granularity=per channel", "a_qconfig.observer=MinMaxObserver")


def test_heads_have_scales_where_there_are_heads() -> None:
    given = "{granularity: per head, observer: MinMaxObserver}"
    scheme = scheme_with(f"slots={{query: {given}, key@decoder: {given}}}")
    for slot, role, axis in (
        ("query", "encoder", HEADS),
        ("key", "decoder", HEADS),
        ("key", "encoder", None),
        ("value", "decoder", None),
    ):
        quantizer = made(scheme, slot, role)
        assert isinstance(quantizer, AffineQuantizer)
        assert quantizer.channel_axis == axis
    assert Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["slots={softmax: {granularity: per head}}"], "slots.softmax.granularity: .* for softmax"),
        (["slots={input: {granularity: per head}}"], "slots.input.granularity: .* for input"),
        (["slots={weight: {ch_axis: 1}}"], "slots.weight.granularity: .* for weight"),
        (
            ["w_qconfig.granularity=per head", "w_qconfig.observer=MinMaxObserver"],
            "w_qconfig.granularity: .* for weight",
        ),
        (
            ["a_qconfig.granularity=per head", "a_qconfig.observer=MinMaxObserver"],
            "a_qconfig.granularity: .* for all activations",
        ),
    ],
)
def test_elsewhere_scales_of_heads_are_refused(overrides: list[str], where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where}, which is for query, key, value of attentions"):
        scheme_with(*overrides)


def test_an_observer_without_channels_has_none_of_heads() -> None:
    problem = "slots.key.observer: AvgMinMaxObserver works per tensor only: .* or use one of MinMax"
    with pytest.raises(ConfigError, match=problem):
        scheme_with("slots={key: {granularity: per head, observer: AvgMinMaxObserver}}")


def test_learned_quantizers_stay_learned() -> None:
    scheme = Scheme.from_yaml(SCHEMES / "ptq4sam-l44.yaml").with_overrides(
        "slots={value: {bit: 6}}"
    )
    assert isinstance(made(scheme, "value", "decoder"), LSQQuantizer)
