"""The cells of the published table: configurations of projects/configs/ x schemes of exp/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from ptq4sam.downloads import asset_at
from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest
from ptq4sam.prompts.spec import PACKAGES, parse_spec
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.configs.experiment import DataConfig, ExperimentConfig
from ptq4sam.shipped import CONFIGS, SCHEMES, located
from ptq4sam.studies.table.published import BITS, FLOAT, METHODS, published
from ptq4sam.studies.table.rows import Cell, MissingInput
from ptq4sam.sweep.settings import Pictures, TrialSettings

_GROUND_TRUTH = ("detector.type=ground-truth", "detector.checkpoint=None")


@dataclass(frozen=True)
class Candidate:
    """One way to the boxes of a row: a configuration, and how the table names it.

    Attributes:
        title: detector, and data where they are not COCO.
        config: file under projects/configs/; {model} stands for the SAM's size.
        options: overrides of the configuration.
        generated: evaluate and calibrate on generated scenes instead of the configuration's data.
    """

    title: str
    config: str
    options: tuple[str, ...] = ()
    generated: bool = False


@dataclass(frozen=True)
class Profile:
    """Which table.

    Attributes:
        detectors: by name, the ways to their boxes: the one of which least is missing is taken.
        models: SAMs.
    """

    detectors: Mapping[str, tuple[Candidate, ...]]
    models: tuple[str, ...]


COCO_MINI = Path("data/coco_mini")
_NANO = "yolox/yolox_nano-sam-vit-nano.py"

PROFILES = {
    "coco": Profile(
        {
            "faster-rcnn": (
                Candidate("Faster R-CNN R50", "faster_rcnn/faster-rcnn-r50_sam-{model}.py"),
            ),
            "yolox": (
                Candidate("YOLOX-L", "yolox/yolo_l-sam-{model}.py"),
                Candidate("YOLOX-L, its authors' weights", "yolox/yolox_l_megvii-sam-{model}.py"),
            ),
            "hdetr": (Candidate("H-Deformable-DETR R50", "hdetr/r50-hdetr_sam-{model}.py"),),
            "dino": (Candidate("DINO FocalNet-L", "focalnet_dino/focalnet-l-dino_sam-{model}.py"),),
        },
        ("vit_b", "vit_l", "vit_h"),
    ),
    "nano": Profile(
        {
            "coco-mini": (
                Candidate("YOLOX-Nano, coco_mini", _NANO),
                Candidate("annotated boxes, coco_mini", _NANO, _GROUND_TRUTH),
            ),
            "scenes": (
                Candidate(
                    "scene detector, generated scenes",
                    "scenes/scene-detector_sam-{model}.py",
                    generated=True,
                ),
            ),
        },
        ("vit_nano",),
    ),
}
"""The table of the paper, and the same for the embedded model."""


@dataclass(frozen=True)
class Request:
    """Which part of the table, and on what.

    Attributes:
        profile: a key of PROFILES.
        detectors: names; empty for all.
        models: names; empty for all.
        bits: of weights and activations; empty for all.
        methods: names; empty for all. The float model is always there.
        limit: evaluate the first pictures only.
        steps: of reconstruction a unit; None for the published 20,000.
        calibrate: calibration pictures; None for the published 32.
        quantize_encoder: quantize the image encoder too.
        data: pictures instead of the configuration's.
        calibration: the same to calibrate on.
        device: torch device; None for CUDA where there is one.
        seed: fixes every random choice.
    """

    profile: str = "coco"
    detectors: Sequence[str] = ()
    models: Sequence[str] = ()
    bits: Sequence[int] = ()
    methods: Sequence[str] = ()
    limit: int | None = None
    steps: int | None = None
    calibrate: int | None = None
    quantize_encoder: bool = True
    data: Pictures | None = None
    calibration: Pictures | None = None
    device: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Found:
    candidate: Candidate
    config: ExperimentConfig
    missing: tuple[MissingInput, ...]
    data: tuple[Pictures, Pictures] | None


@dataclass
class Table:
    """Reads the configurations and schemes that a request needs.

    Args:
        request: which part of the table.
        root: folder of projects/configs/ and exp/; None for the current one, else what ships.

    Raises:
        ConfigError: a filter is unknown.
    """

    request: Request
    root: Path | None = None
    _schemes: dict[str, Scheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._root = self.root or Path()
        asked = self.request
        self._profile = PROFILES[one_of("profile", asked.profile, PROFILES)]
        self._detectors = chosen("detector", asked.detectors, self._profile.detectors)
        self._models = chosen("model", asked.models, self._profile.models)
        self._methods = chosen("method", asked.methods, METHODS)
        self._bits = [int(bits) for bits in chosen("bits", asked.bits, list(map(str, BITS)))]

    def cells(self) -> Iterator[Cell]:
        """The cells in the order of the table, each with what it misses."""
        for detector in self._detectors:
            for model in self._models:
                ways = [self._look(one, model) for one in self._profile.detectors[detector]]
                # The first of equals is the published way.
                found = min(ways, key=lambda way: len(way.missing))
                yield from self._block(detector, model, found)

    def _block(self, detector: str, model: str, found: _Found) -> Iterator[Cell]:
        kinds: list[tuple[int | None, str]] = [(None, FLOAT)]
        kinds += [(b, method) for b in self._bits for method in self._methods if method != FLOAT]
        for bits, method in kinds:
            # The float model's results are shared by all trials, whatever their scheme.
            name = f"minmax{BITS[0]}{BITS[0]}" if bits is None else f"{method}{bits}{bits}"
            yield Cell(
                detector,
                found.candidate.title,
                model,
                bits,
                method,
                self._settings(found, self._scheme(name)),
                published(detector, model, bits, method),
                found.missing,
            )

    def _look(self, candidate: Candidate, model: str) -> _Found:
        """Read a configuration and see what is there of what it needs."""
        path = candidate.config.format(model=model.replace("_", "-"))
        file = located(self._root / CONFIGS / path)
        config = ExperimentConfig.from_file(file, *candidate.options)
        data = None if candidate.generated else self._data(config)
        # With how many pictures of a folder are enough.
        needed: list[tuple[Path | None, int | None]] = [
            (config.detector.checkpoint, None),
            (config.sam.checkpoint, None),
        ]
        if data is not None:
            scored, calibrated = data
            needed += [(scored.images, None), (scored.annotations, None)]
            needed += [(calibrated.images, self._calibrate), (calibrated.annotations, None)]
        missing = [
            missing_input(path, enough)
            for path, enough in dict.fromkeys(needed)
            if path is not None and not path.exists()
        ]
        packages, install = PACKAGES.get(parse_spec(config.detector.prompts).kind, ((), ""))
        absent = ", ".join(name for name in packages if find_spec(name) is None)
        if absent:
            missing.insert(0, MissingInput(absent, remedy=f"{absent}: {install}"))
        return _Found(candidate, config, tuple(dict.fromkeys(missing)), data)

    @property
    def _calibrate(self) -> int:
        """How many calibration pictures there are."""
        return self._scheme(f"minmax{BITS[0]}{BITS[0]}").calibrate

    def _data(self, config: ExperimentConfig) -> tuple[Pictures, Pictures]:
        asked = self.request
        return (
            asked.data or _annotated(config.data),
            asked.calibration or _annotated(config.calibration),
        )

    def _settings(self, found: _Found, scheme: Scheme) -> TrialSettings:
        asked, config = self.request, found.config
        detector = config.detector
        return TrialSettings(
            scheme=scheme,
            steps=asked.steps if scheme.recon is not None else None,
            model=config.sam.type,
            checkpoint=config.sam.checkpoint,
            quantize_encoder=asked.quantize_encoder,
            data=None if found.data is None else found.data[0],
            calibration=None if found.data is None else found.data[1],
            limit=asked.limit,
            prompts=detector.type if found.missing else detector.prompts,
            prompting=config.prompting,
            device=asked.device,
            seed=asked.seed,
        )

    def _scheme(self, name: str) -> Scheme:
        if name not in self._schemes:
            scheme = Scheme.from_yaml(located(self._root / SCHEMES / f"{name}.yaml"))
            if self.request.calibrate is not None:
                scheme = replace(scheme, calibrate=self.request.calibrate)
            self._schemes[name] = scheme
        return self._schemes[name]


def one_of(kind: str, name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """A name that is known.

    Raises:
        ConfigError: it is not; the nearest one is named.
    """
    if name in known:
        return name
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"the table has no {kind} {name!r}: {hint}")


def chosen(
    kind: str, asked: Sequence[object], known: Mapping[str, object] | Sequence[str]
) -> list[str]:
    """The known names that were asked for, in the table's order; all where none was.

    Raises:
        ConfigError: one is not known.
    """
    names = {one_of(kind, str(name), known) for name in asked}
    return [name for name in known if name in names or not names]


def _annotated(data: DataConfig | None) -> Pictures:
    if data is None or data.annotations is None:
        raise ConfigError("a configuration of the table has data without annotations: add them")
    return Pictures(data.images, data.annotations)


def missing_input(path: Path, enough: int | None) -> MissingInput:
    """A file or folder that is not there, and what brings it.

    Args:
        path: of it.
        enough: how many pictures of a folder are needed; None for all.
    """
    asset = asset_at(path, enough)
    if asset is None and COCO_MINI.name in path.parts:
        folder = Path(*path.parts[: path.parts.index(COCO_MINI.name) + 1])
        lacking = path if folder.exists() else folder
        return MissingInput(str(lacking), remedy=f"{lacking} is not there")
    return MissingInput(str(path), None if asset is None else asset.name)
