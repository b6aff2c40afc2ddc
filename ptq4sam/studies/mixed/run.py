"""Mixed precision from its settings to a scheme: measure, choose, write."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam import parallel
from ptq4sam.deploy.manifest import origin
from ptq4sam.errors import ConfigError
from ptq4sam.families.checkpoint import image_size_of, load_sam
from ptq4sam.files import write_json, write_text
from ptq4sam.numerics import reproducible
from ptq4sam.progress import Progress, silent
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.records import Record, unknown_key
from ptq4sam.runs.measurements import Measurements
from ptq4sam.runs.prepared import Preparation
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.reproducibility import versions
from ptq4sam.runs.settings import RunSettings
from ptq4sam.runs.work_dir import working_in
from ptq4sam.studies.mixed.allocation import Option, allocate
from ptq4sam.studies.mixed.prices import Bits, Budget, Prices, prices_of, read_budget
from ptq4sam.studies.sensitivity.effects import Effect
from ptq4sam.studies.sensitivity.study import ONLY, Study
from ptq4sam.studies.sensitivity.targets import targets_of

_log = logging.getLogger(__name__)

METRICS = ("logits", "agreement")
"""What errors are: noise over signal of the mask logits, or what float masks lose in IoU."""

_ROLES = ("weights", "activations")

Errors = dict[str, dict[str, dict[int, float]]]
"""By unit, role and bits."""


@dataclass(frozen=True)
class MixedSettings(Record):
    """What is asked for.

    Attributes:
        budget: limits as `read_budget` takes them.
        bits: that weights and activations of each unit are chosen from.
        pictures: that errors are measured on.
        metric: one of METRICS.
        output: where the scheme is written.
        resume: go on with what an earlier run, killed or for another budget, has measured.
    """

    budget: tuple[str, ...]
    output: Path
    bits: tuple[int, ...] = (3, 4, 5, 6, 8)
    pictures: int = 8
    metric: str = "logits"
    resume: bool = False

    def _validate(self) -> None:
        self._require(bool(self.budget), "budget", "one limit or more")
        self._require(self.pictures >= 1, "pictures", "1 or more")
        possible = all(2 <= bits <= 16 for bits in self.bits)
        self._require(len({*self.bits}) > 1 and possible, "bits", "two or more of 2 to 16")
        if self.metric not in METRICS:
            raise unknown_key(self.metric, METRICS).within("metric")


@dataclass(frozen=True)
class Mixed:
    """The outcome.

    Attributes:
        scheme: with the bits of each unit among its exceptions.
        error: the sum of the units' errors.
        taken: bytes of weights and bit operations.
        budget: what these may be.
        chosen: bits of each unit.
    """

    scheme: Scheme
    error: float
    taken: tuple[int, int]
    budget: Budget
    chosen: dict[str, Bits]

    def lines(self) -> list[str]:
        """For people."""
        width = max(map(len, self.chosen))
        units = [f"{name:<{width}}  W{w}A{a}" for name, (w, a) in self.chosen.items()]
        limits = [
            f"{name}: {self.taken[place]:,} of {limit:,}"
            for name, place, limit in self.budget.limits
        ]
        return [*units, *limits, f"sum of the units' errors: {self.error:.4g}"]


@reproducible()
def mix(settings: RunSettings, asked: MixedSettings, progress: Progress = silent) -> Mixed:
    """Measure each unit at each number of bits, choose, and write the scheme and mixed.json.

    Raises:
        ConfigError: the budget is below the least possible, or settings do not go together.
    """
    with working_in(settings.work_dir):
        scheme, budget, prices = _frame(settings, asked)
        errors = _errors(settings, asked, scheme, progress)
        found = choose(scheme, prices, errors, budget)
        for line in found.lines():
            _log.info("%s", line)
        if parallel.is_first():
            write_text(found.scheme.to_yaml(), asked.output)
            write_json(_content(settings, asked, found, errors), settings.work_dir / "mixed.json")
        Preparation(settings).forget_journal()
    return found


def plan_lines(settings: RunSettings, asked: MixedSettings) -> list[str]:
    """The budget beside what is possible, before anything is measured; errors as of `mix`."""
    _, budget, prices = _frame(settings, asked)
    ends = [prices.total(dict.fromkeys(prices.units, (b, b))) for b in _ends(asked)]
    return [
        f"{name}: at most {limit:,}; possible are {ends[0][place]:,} to {ends[1][place]:,}"
        for name, place, limit in budget.limits
    ] + [f"{len(prices.units)} units, measured at {', '.join(map(str, asked.bits))} bits"]


def _ends(asked: MixedSettings) -> tuple[int, int]:
    return min(asked.bits), max(asked.bits)


def _frame(settings: RunSettings, asked: MixedSettings) -> tuple[Scheme, Budget, Prices]:
    """The scheme, what it may take, and what its units take."""
    scheme = settings.scheme
    if scheme is None:
        raise ConfigError("mixed precision needs a scheme: give one, as exp/ptq4sam-s44.yaml")
    if scheme.units:
        raise ConfigError("the scheme has units of other bits already: give one without `units`")
    if named := [selector for selector, said in scheme.slot_formats.items() if said.bit]:
        raise ConfigError(
            f"the scheme has bits of their own in slots ({', '.join(named)}), but bits of a unit "
            "are those of all its slots: give them without `bit`"
        )
    model, encoder = settings.float_model, settings.quantize_encoder
    side = image_size_of(model, settings.checkpoint)
    budget = read_budget(asked.budget, model, scheme, encoder, side)
    bits = sorted({*asked.bits})
    prices = prices_of(model, scheme, encoder, list(itertools.product(bits, bits)), side)
    require_possible(budget, prices, (bits[0], bits[0]))
    return scheme, budget, prices


def require_possible(budget: Budget, prices: Prices, least: Bits) -> None:
    """Refuse a budget that not even the fewest bits keep.

    Raises:
        ConfigError: the message says what is possible.
    """
    possible = prices.total(dict.fromkeys(prices.units, least))
    for name, place, limit in budget.limits:
        if limit < possible[place]:
            raise ConfigError(
                f"asked for at most {limit:,} {name}, but the least possible is "
                f"{possible[place]:,}, with all units at W{least[0]}A{least[1]}: raise the "
                "budget, or allow fewer bits"
            )


def choose(scheme: Scheme, prices: Prices, errors: Errors, budget: Budget) -> Mixed:
    """The bits of least error within a budget.

    Args:
        scheme: without exceptions.
        prices: of each unit.
        errors: of each unit's weights and activations; those of both add up.
        budget: a possible one.
    """
    limits = budget.limits
    units: dict[str, list[Option]] = {}
    pairs: dict[tuple[str, str], Bits] = {}
    for unit, by_bits in prices.units.items():
        weights, activations = (falling(errors[unit][role]) for role in _ROLES)
        for (w, a), price in by_bits.items():
            level = f"w{w}a{a}"
            pairs[unit, level] = (w, a)
            paid = tuple(price[place] for _, place, _ in limits)
            units.setdefault(unit, []).append(Option(level, weights[w] + activations[a], paid))
    left = [limit - prices.fixed[place] for _, place, limit in limits]
    found = allocate(units, left)
    chosen = {unit: pairs[unit, option.level] for unit, option in found.items()}
    rest = (scheme.w_qconfig.bit, scheme.a_qconfig.bit)
    levels: dict[str, int | str] = {
        unit: both[0] if both[0] == both[1] else found[unit].level
        for unit, both in chosen.items()
        if both != rest
    }
    error = sum(option.error for option in found.values())
    return Mixed(scheme.with_units(levels), error, prices.total(chosen), budget, chosen)


def falling(errors: Mapping[int, float]) -> dict[int, float]:
    """Errors by bits, none below that of more bits: what fewer bits seem to gain is chance."""
    found: dict[int, float] = {}
    least = 0.0
    for bits in sorted(errors, reverse=True):
        least = max(least, errors[bits])
        found[bits] = least
    return found


def _errors(
    settings: RunSettings, asked: MixedSettings, scheme: Scheme, progress: Progress
) -> Errors:
    """Each unit's error with its weights alone, and its activations alone, at each bits."""
    preparation = Preparation(settings, progress)
    dataset, source = preparation.pictures()
    calibration = settings.calibration
    fingerprint = {
        "weights": origin(load_sam(settings.float_model, settings.checkpoint)),
        "scheme": json.dumps(dataclasses.replace(scheme, recon=None).to_dict()),
        "quantize_encoder": str(settings.quantize_encoder),
        "calibration": f"{calibration} {settings.calibration_prompts} {settings.prompts}",
        "pictures": f"{asked.pictures} of {len(dataset.images)}, {dataset.fingerprint()} "
        f"{source.fingerprint()}",
        "prompting": json.dumps(dataclasses.asdict(settings.prompting)),
        "seed": str(settings.seed),
        "versions": json.dumps(versions()),
    }
    # Not in the journal: another budget needs the same measurements.
    measurements = Measurements(
        settings.work_dir / "measurements.json", fingerprint, resume=asked.resume
    )
    errors: Errors = {}
    # Without reconstruction, as accuracy control compares units: it would be hours a width.
    statistic = dataclasses.replace(scheme, recon=None)
    for each in sorted({*asked.bits}):
        own = dataclasses.replace(
            settings,
            scheme=statistic.with_bits(each, each),
            work_dir=settings.work_dir / JOURNAL / f"{each}_bits",
        )
        name = f"units at {each} bits"
        measure = functools.partial(_effects, own, asked.pictures, name, measurements, progress)
        for unit, role, effect in measurements.value(f"{each} bits", measure):
            error = _error(Effect(**effect), asked.metric)
            errors.setdefault(unit, {}).setdefault(role, {})[each] = error
    return errors


def _effects(
    settings: RunSettings, pictures: int, name: str, measurements: Measurements, progress: Progress
) -> list[tuple[str, str, dict[str, Any]]]:
    """Effects of every unit's weights and of its activations, the rest float."""
    prepared = Preparation(settings, progress).prepare()
    targets = [target for target in targets_of(prepared.sam, ("unit",), _ROLES) if target.role]
    study = Study(
        prepared.sam,
        prepared.float_sam,
        prepared.dataset,
        prepared.source,
        settings.prompting,
        measurements,
        progress,
    )
    found = study.effects(targets, pictures, name, kinds=(ONLY,))
    return [
        (target.path, target.role, dataclasses.asdict(found[ONLY, target.name]))
        for target in targets
    ]


def _error(effect: Effect, metric: str) -> float:
    return 1 - effect.agreement if metric == "agreement" else effect.logits_relative_error**2


def _content(
    settings: RunSettings, asked: MixedSettings, found: Mixed, errors: Errors
) -> dict[str, Any]:
    """What mixed.json holds."""
    return {
        "model": settings.float_model,
        "metric": asked.metric,
        "bits": list(asked.bits),
        "budget": {name: limit for name, _, limit in found.budget.limits},
        "taken": {"bytes of weights": found.taken[0], "bit operations": found.taken[1]},
        "error": found.error,
        "units": {name: {"weights": w, "activations": a} for name, (w, a) in found.chosen.items()},
        "errors": errors,
        "seed": settings.seed,
        "versions": versions(),
    }
