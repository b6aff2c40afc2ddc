"""Tables of the studies that came with families: models x schemes x what is measured.

Each cell is a trial as those of PTQ4SAM's table are. Cells of one model and scheme share their
calibration, those of one model and measure the float model's masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ptq4sam.errors import ConfigError
from ptq4sam.evaluation.prompting import Prompting
from ptq4sam.families import VARIANTS
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.shipped import SCHEMES, located
from ptq4sam.studies.table.cells import COCO_MINI, Request, chosen, missing_input, one_of
from ptq4sam.studies.table.published import FLOAT, family_content, published_of_family
from ptq4sam.studies.table.rows import Cell, Metric, MissingInput
from ptq4sam.sweep.settings import Pictures, TrialSettings

PROMPTING = Prompting(best_in_multi_mask=True, keep_scores=True, max_per_image=None)
"""As EfficientViT-SAM and TinySAM are evaluated: all boxes, the best of three masks each, which has
the box's score."""

_COCO = Path("data/coco")
_TRAIN = Pictures(_COCO / "train2017", _COCO / "annotations/instances_train2017.json")
_VAL = Pictures(_COCO / "val2017", _COCO / "annotations/instances_val2017.json")
_LVIS = Pictures(_COCO, Path("data/lvis/lvis_v1_val.json"))
_COCO_BOXES, _LVIS_BOXES = "data/coco/coco_vitdet.json", "data/lvis/lvis_vitdet.json"
_EVERY_ANNOTATION = "ground-truth:all"
_LVIS_PACKAGE = MissingInput(
    "faster-coco-eval", remedy="faster-coco-eval: pip install 'ptq4sam[evaluation]'"
)


@dataclass(frozen=True)
class Measure:
    """What is measured.

    Attributes:
        title: for people.
        metric: of it.
        prompts: where boxes come from.
        data: pictures; None for generated scenes.
        calibration: the same to calibrate on.
        needs: the folders of its pictures, where that of `data` holds several.
        by_lvis: whether LVIS's rules are needed.
    """

    title: str
    metric: Metric
    prompts: str
    data: Pictures | None = None
    calibration: Pictures | None = None
    needs: tuple[Path, ...] = ()
    by_lvis: bool = False


@dataclass(frozen=True)
class Method:
    """A scheme of a table.

    Attributes:
        title: for people.
        scheme: a file of exp/ without its suffix.
        bits: of weights and activations; None for the float model.
    """

    title: str
    scheme: str
    bits: int | None = None


@dataclass(frozen=True)
class Study:
    """A family's table; its methods, models and published figures are in a file beside this one.

    Attributes:
        title: above it.
        saved: megabytes that a scheme saves of a model; None where no study counts them.
    """

    title: str
    saved: Callable[[str, Scheme], float] | None = None


def _saved(model: str, scheme: Scheme) -> float:
    from ptq4sam.families.efficientvit.published import megabytes_saved

    return megabytes_saved(model, scheme)


_SPLITS = (_VAL.images, _TRAIN.images)
_ANNOTATED: Metric = "mean_iou"

MEASURES = {
    "coco": {
        "coco-truth": Measure("COCO, annotated boxes", _ANNOTATED, _EVERY_ANNOTATION, _VAL, _TRAIN),
        "coco-vitdet": Measure("COCO, ViTDet's boxes", "AP", _COCO_BOXES, _VAL, _TRAIN),
        "lvis-truth": Measure(
            "LVIS, annotated boxes", _ANNOTATED, _EVERY_ANNOTATION, _LVIS, _TRAIN, _SPLITS, True
        ),
        "lvis-vitdet": Measure(
            "LVIS, ViTDet's boxes", "AP", _LVIS_BOXES, _LVIS, _TRAIN, _SPLITS, True
        ),
    },
    "nano": {
        "mini-truth": Measure(
            "coco_mini, annotated boxes",
            _ANNOTATED,
            _EVERY_ANNOTATION,
            Pictures(COCO_MINI / "images/val2017", COCO_MINI / "annotations/instances_val.json"),
            Pictures(
                COCO_MINI / "images/train2017", COCO_MINI / "annotations/instances_train.json"
            ),
        ),
        "scenes-truth": Measure("generated scenes, annotated boxes", _ANNOTATED, _EVERY_ANNOTATION),
        "scenes": Measure("generated scenes, scene detector", "AP", "scene-detector"),
    },
}
"""What is measured in each profile, by the names of filters."""

STUDIES = {
    "efficientvit": Study("EfficientViT-SAM quantized", _saved),
    "tinysam": Study("TinySAM quantized"),
}
"""Tables by name, beside PTQ4SAM's."""


@dataclass
class StudyTable:
    """Reads what a request of a family's table needs.

    Args:
        name: a key of STUDIES.
        request: which part of it; its `detectors` are measures.

    Raises:
        ConfigError: a filter is unknown, or something is asked that its schemes have not.
    """

    name: str
    request: Request

    def __post_init__(self) -> None:
        asked, study = self.request, STUDIES[self.name]
        self._study = study
        profile = one_of("profile", asked.profile, MEASURES)
        self._measures = MEASURES[profile]
        self._names = chosen("detector", asked.detectors, self._measures)
        content = family_content(self.name)
        self._known = {name: Method(**values) for name, values in content["methods"].items()}
        self._models: Mapping[str, Sequence[str]] = {
            model: names or list(self._known)
            for model, names in content["profiles"][profile].items()
        }
        self._asked_models = chosen("model", asked.models, self._models)
        methods = chosen("method", asked.methods, self._known)
        known = sorted({m.bits for m in self._known.values() if m.bits is not None}, reverse=True)
        bits = {int(one) for one in chosen("bits", asked.bits, list(map(str, known)))}
        self._methods = [
            name
            for name, method in self._known.items()
            if name == FLOAT or (name in methods and method.bits in bits)
        ]
        self._saved: dict[tuple[str, str], float] = {}
        self._schemes = {name: self._scheme(self._known[name]) for name in self._methods}
        if asked.steps is not None and all(s.recon is None for s in self._schemes.values()):
            raise ConfigError(
                f"asked for {asked.steps} steps of reconstruction, but no scheme of the table "
                f"{self.name} reconstructs: leave the steps away"
            )

    def cells(self) -> Iterator[Cell]:
        """The cells in the order of the table, each with what it misses."""
        for measure in self._names:
            for model in self._asked_models:
                missing = self._missing(self._measure(measure), model)
                for method in self._methods:
                    if method in self._models[model]:
                        yield self._cell(measure, model, method, missing)

    def _cell(self, name: str, model: str, method: str, missing: tuple[MissingInput, ...]) -> Cell:
        measure, known = self._measure(name), self._known[method]
        return Cell(
            name,
            measure.title,
            model,
            known.bits,
            method,
            self._settings(measure, model, self._schemes[method]),
            published_of_family(self.name, name, model, method),
            missing,
            known.title,
            measure.metric,
            by_size=True,
            saved=None if known.bits is None else self._saved_of(model, method),
        )

    def _saved_of(self, model: str, method: str) -> float | None:
        """Megabytes that a scheme saves, once for all measures; None of other families' models."""
        if self._study.saved is None or model not in VARIANTS:
            return None
        if VARIANTS[model].family.name != self.name:
            return None
        if (model, method) not in self._saved:
            self._saved[model, method] = self._study.saved(model, self._schemes[method])
        return self._saved[model, method]

    def _measure(self, name: str) -> Measure:
        """A measure, on the pictures that were given instead of its own."""
        measure, asked = self._measures[name], self.request
        if measure.data is None:
            return measure
        data, calibration = asked.data or measure.data, asked.calibration or measure.calibration
        needs = () if asked.data is not None else measure.needs
        return replace(measure, data=data, calibration=calibration, needs=needs)

    def _settings(self, measure: Measure, model: str, scheme: Scheme) -> TrialSettings:
        asked = self.request
        return TrialSettings(
            scheme=scheme,
            steps=asked.steps if scheme.recon is not None else None,
            # A model that is not there yet runs nothing.
            model=model if model in VARIANTS else "vit_nano",
            checkpoint=_checkpoint(model),
            quantize_encoder=asked.quantize_encoder,
            data=measure.data,
            calibration=measure.calibration,
            limit=asked.limit,
            prompts=measure.prompts,
            calibration_prompts="ground-truth",
            prompting=PROMPTING,
            device=asked.device,
            seed=asked.seed,
        )

    def _missing(self, measure: Measure, model: str) -> tuple[MissingInput, ...]:
        """What a measure of a model needs and is not there."""
        if model not in VARIANTS:
            return (MissingInput(f"weights of {model}", remedy=f"{model} has no weights yet"),)
        needed: list[tuple[Path | None, int | None]] = [(_checkpoint(model), None)]
        data, calibration = measure.data, measure.calibration
        if data is not None and calibration is not None:
            folders = measure.needs or (data.images,)
            needed += [(path, None) for path in (*folders, data.annotations)]
            if calibration.images not in folders:
                enough = max(scheme.calibrate for scheme in self._schemes.values())
                needed.append((calibration.images, enough))
            needed.append((calibration.annotations, None))
        if measure.prompts.endswith(".json"):
            needed.append((Path(measure.prompts), None))
        found = [
            missing_input(path, enough)
            for path, enough in dict.fromkeys(needed)
            if path is not None and not path.exists()
        ]
        if measure.by_lvis and find_spec("faster_coco_eval") is None:
            found.append(_LVIS_PACKAGE)
        return tuple(dict.fromkeys(found))

    def _scheme(self, method: Method) -> Scheme:
        scheme = Scheme.from_yaml(located(SCHEMES / f"{method.scheme}.yaml"))
        asked = self.request.calibrate
        return scheme if asked is None else replace(scheme, calibrate=asked)


def _checkpoint(model: str) -> Path | None:
    """A model's weights; None where they ship with the package."""
    if model not in VARIANTS or VARIANTS[model].weights.embedded is not None:
        return None
    return Path("ckpt") / VARIANTS[model].weights.file
