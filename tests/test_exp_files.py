"""The files that ship: schemes in exp/, experiments in projects/configs/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ptq4sam.data.images import ImageSet
from ptq4sam.downloads import find_asset
from ptq4sam.prompts import DetrDetector, open_prompts
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.configs.experiment import ExperimentConfig

ROOT = Path(__file__).resolve().parents[1]
ROWS = ["minmax", "percentile", "omse", "ptq4sam-s", "adaround", "brecq", "qdrop", "ptq4sam-l"]
MIXED = ("mix-dwsc", "mix-mbc-neck")
NEWER = ["saq-sam", "ahcptq", "ahcq-sam", "car-sam"]
PUBLISHED_EXPERIMENTS = [
    f"{stem}-{size}.py"
    for stem in (
        "yolox/yolo_l-sam-vit",
        "faster_rcnn/faster-rcnn-r50_sam-vit",
        "hdetr/r50-hdetr_sam-vit",
        "focalnet_dino/focalnet-l-dino_sam-vit",
    )
    for size in "blh"
]


def scheme(name: str) -> Scheme:
    return Scheme.from_yaml(ROOT / "exp" / f"{name}.yaml")


def experiment(name: str) -> ExperimentConfig:
    return ExperimentConfig.from_file(ROOT / "projects" / "configs" / name)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("row", ["config", *ROWS])
def test_scheme_of_each_row(row: str, bits: int) -> None:
    read = scheme(f"{row}{bits}{bits}")
    assert (read.a_qconfig.bit, read.w_qconfig.bit, read.calibrate) == (bits, bits, 32)
    assert (read.w_qconfig.ch_axis, read.compat) == (0, "faithful")
    assert (read.recon is None) == (row in ("minmax", "percentile", "omse", "ptq4sam-s"))
    with_methods = row in ("config", "ptq4sam-s", "ptq4sam-l")
    assert {read.ptq4sam.BIG, read.ptq4sam.AGQ} == {with_methods}


def test_every_scheme_file_is_tested() -> None:
    names = {path.stem for path in (ROOT / "exp").glob("*.yaml")}
    rows = {f"{row}{bits}{bits}" for row in ["config", *ROWS, *NEWER] for bits in (4, 6)}
    assert names == rows | {"w8a8", "sam4-s", "sam4-l"}


@pytest.mark.parametrize("name", ["sam4-s", "sam4-l"])
def test_recipes_have_nothing_of_more_bits(name: str) -> None:
    recipe = scheme(name)
    assert (recipe.a_qconfig.bit, recipe.w_qconfig.bit) == (4, 4)
    assert (recipe.recon is None) == (name == "sam4-s")
    assert {said.bit for said in recipe.slot_formats.values()} == {None}
    assert recipe.units == {}
    # Neither the published search of granularities nor its logarithms.
    assert not recipe.ptq4sam.AGQ
    assert recipe.slots == scheme("sam4-s").slots


def test_schemes_of_a_study_differ_in_what_stays_float() -> None:
    folder = ROOT / "exp" / "efficientvit_sam"
    names = {f"{form}{name}" for form in ("", "study-") for name in ("int8", *MIXED)}
    assert {path.stem for path in folder.glob("*")} == names | {"w8a8"}
    assert scheme("efficientvit_sam/w8a8").units == scheme("efficientvit_sam/int8").units
    for form, compat in (("", "faithful"), ("study-", "study")):
        whole = scheme(f"efficientvit_sam/{form}int8")
        assert set(whole.units) == {"mask_decoder.transformer"}
        assert whole.compat == compat
        for name in MIXED:
            read = scheme(f"efficientvit_sam/{form}{name}")
            assert replace(read, units=whole.units) == whole
            assert set(read.units) > set(whole.units)
            assert set(read.units.values()) == {"float"}


@pytest.mark.parametrize("bits", ["44", "66"])
def test_relations_between_rows(bits: str) -> None:
    large = scheme("ptq4sam-l" + bits)
    assert scheme("config" + bits) == large
    assert scheme("qdrop" + bits) == large.with_overrides("ptq4sam.BIG=false", "ptq4sam.AGQ=false")
    assert scheme("ptq4sam-s" + bits) == large.with_overrides(
        "recon=null",
        "a_qconfig.quantizer=FixedFakeQuantize",
        "w_qconfig.quantizer=FixedFakeQuantize",
    )
    brecq = scheme("brecq" + bits)
    assert brecq.recon is not None
    assert (brecq.recon.learn_scale, brecq.recon.drop_prob) == (False, 0)
    assert scheme("adaround" + bits) == brecq.with_overrides("recon.granularity=layer")


@pytest.mark.parametrize("bits", ["44", "66"])
def test_newer_rows_add_to_earlier_ones(bits: str) -> None:
    assert scheme("saq-sam" + bits) == scheme("ptq4sam-s" + bits).with_overrides("methods=[pcc]")
    behind = "input@after-gelu: {grid: hybrid}, input@after-relu: {grid: hybrid}"
    before = "input@before-attention: {grid: grouped}, input@before-mlp: {grid: grouped}"
    ahcptq = scheme("ahcptq" + bits)
    large = scheme("ptq4sam-l" + bits)
    assert ahcptq == large.with_overrides(f"slots={{{before}, {behind}}}")
    assert scheme("ahcq-sam" + bits) == large.with_overrides(
        "ptq4sam.AGQ=false",
        f"slots={{{before}, {behind}, softmax: {{grid: lnq}}}}",
        "methods=[acnr]",
    )
    assert scheme("car-sam" + bits) == scheme("qdrop" + bits).with_overrides(
        "recon.granularity=joint", "methods=[mac]"
    )


@pytest.mark.parametrize("bits", ["44", "66"])
def test_observers_of_the_statistic_rows(bits: str) -> None:
    observers = {
        row: (scheme(row + bits).a_qconfig.observer, scheme(row + bits).w_qconfig.observer)
        for row in ("minmax", "percentile", "omse")
    }
    assert observers == {
        "minmax": ("MinMaxObserver", "MinMaxObserver"),
        "percentile": ("PCTObserver", "MinMaxObserver"),
        "omse": ("MSEObserver", "MSEObserver"),
    }


@pytest.mark.parametrize("name", PUBLISHED_EXPERIMENTS)
def test_published_experiment(name: str) -> None:
    read = experiment(name)
    size = name.removesuffix(".py")[-1]
    assert read.sam.type == f"vit_{size}"
    assert str(read.sam.checkpoint).startswith(f"ckpt/sam_vit_{size}_")
    assert read.data.images == Path("data/coco/val2017")
    assert read.calibration is not None
    assert read.calibration.images == Path("data/coco/train2017")
    assert read.prompting.use_sam_iou
    # The published YOLOX keeps boxes above 0.05, in any number.
    assert read.prompting.max_per_image == (
        300 if "dino" in name else None if "yolo" in name else 100
    )
    if "yolo" in name or "faster" in name:
        assert read.prompting.score_threshold == 0.05
    if read.detector.config is not None:
        assert (ROOT / read.detector.config).is_file()


DETRS = [
    path.relative_to(ROOT / "projects" / "configs")
    for folder in ("hdetr", "focalnet_dino")
    for path in sorted((ROOT / "projects" / "configs" / folder).glob("*.py"))
]


@pytest.mark.parametrize("name", DETRS, ids=str)
def test_experiment_with_a_detr(
    name: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ROOT / "projects" / "configs" / name
    monkeypatch.chdir(tmp_path)
    kind = "hdetr" if name.parent.name == "hdetr" else "focalnet-dino"
    asset = find_asset({"hdetr": "hdetr-r50", "focalnet-dino": "focalnet-dino-l"}[kind])
    read = ExperimentConfig.from_file(path)
    assert read.detector.checkpoint == asset.path
    assert read.prompting.best_in_multi_mask == ("best-in-multi" in name.stem)
    assert read.prompting.cascade == ("cascade" in name.stem)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"read at the first picture")
    read = ExperimentConfig.from_file(path, f"detector.checkpoint={weights}")
    source = open_prompts(read.detector.prompts, ImageSet(skip_bad=False))
    assert isinstance(source, DetrDetector)
    assert (source.kind, source.path) == (kind, weights)
    assert source.limit == read.prompting.max_per_image


def test_every_variant_of_the_detrs_is_there() -> None:
    variants = {"hdetr": {"b": 4, "l": 1, "h": 1}, "focalnet_dino": {"b": 1, "l": 1, "h": 2}}
    counted = {
        folder: {
            size: sum(f"sam-vit-{size}" in path.stem for path in DETRS if folder in str(path))
            for size in "blh"
        }
        for folder in variants
    }
    assert counted == variants


@pytest.mark.parametrize("size", "blh")
def test_yolox_l_without_mmdet(size: str) -> None:
    read, published = (
        experiment(f"yolox/{stem}-sam-vit-{size}.py") for stem in ("yolox_l_megvii", "yolo_l")
    )
    assert read.detector.prompts == "yolox:ckpt/yolox_l.pth"
    # The published detector keeps boxes in any number, ours 100.
    limited = replace(published.prompting, max_per_image=100)
    expected = replace(published, prompting=limited)
    assert replace(read, detector=published.detector) == expected


def test_every_experiment_can_be_read() -> None:
    paths = [p for p in (ROOT / "projects" / "configs").glob("*/*.py") if p.parent.name != "_base_"]
    assert len(paths) > len(PUBLISHED_EXPERIMENTS)
    for path in paths:
        ExperimentConfig.from_file(path)


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("scenes/scene-detector_sam-vit-nano.py", "scene-detector"),
        ("scenes/ground-truth_sam-vit-nano.py", "ground-truth"),
        ("yolox/yolox_nano-sam-vit-nano.py", "onnx:ckpt/yolox_nano.onnx"),
    ],
)
def test_experiment_with_vit_nano(name: str, prompts: str) -> None:
    read = experiment(name)
    assert (read.sam.type, read.sam.checkpoint) == ("vit_nano", None)
    assert read.detector.prompts == prompts


def test_the_scheme_for_deployment_has_integer_products() -> None:
    deployed = scheme("w8a8")
    for tensors in (deployed.a_qconfig, deployed.w_qconfig):
        assert (tensors.bit, tensors.symmetric) == (8, True)
    # Only the decoder: the encoder keeps integer products of attentions.
    assert deployed.ptq4sam.AGQ == "decoder"
