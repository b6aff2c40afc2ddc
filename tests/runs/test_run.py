from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq4sam.errors import ConfigError, DataError
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.phases import Phases
from ptq4sam.runs.run import Run
from ptq4sam.runs.settings import DataSettings, RunSettings
from ptq4sam.runs.summary import summary_table
from tests.tiny_runs import SCHEMES, SMALL, Tiny, read_metrics

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> RunSettings:
    return RunSettings(
        model=SMALL,
        data=DataSettings(tiny.images(), tiny.annotations()),
        prompts="ground-truth",
        work_dir=tmp_path / "w",
        checkpoint=tiny.checkpoint,
        cache_dir=tmp_path / "prompts",
        limit=1,
        device="cpu",
    )


def test_metrics_are_returned_and_written(settings: RunSettings) -> None:
    before = logging.getLogger("ptq4sam").level
    metrics = Run(settings).execute()
    written = read_metrics(settings.work_dir)
    assert written["mean_iou"] == metrics["mean_iou"]
    assert written["arithmetic"]["device"] == "cpu"
    assert written["arithmetic"]["float32 products"] == "ieee"
    assert written["arithmetic"]["kernels"] in ("compiled", "one by one")
    # Nothing large is annotated in some scenes: NaN here, null in the file.
    assert [key for key, value in written.items() if value is None] == [
        key for key, value in metrics.items() if isinstance(value, float) and np.isnan(value)
    ]
    assert not list(settings.work_dir.glob(".*"))
    assert logging.getLogger("ptq4sam").level == before


def test_a_bad_data_set_is_found_before_the_model_is_loaded(settings: RunSettings) -> None:
    broken = replace(
        settings, data=DataSettings(settings.data.images / "no"), checkpoint=Path("no.pth")
    )
    with pytest.raises(DataError, match=r"not there: SAM no\.pth .*, pictures .*val/no: name"):
        Run(broken).execute()
    assert not settings.work_dir.exists()


def test_a_seed_fixes_the_global_generators(settings: RunSettings) -> None:
    Run(replace(settings, seed=5)).execute()
    first = (torch.rand(1).item(), np.random.random())
    Run(replace(settings, seed=5)).execute()
    assert (torch.rand(1).item(), np.random.random()) == first


def test_no_permission_on_an_output_is_found_at_once(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, for whom every folder is open.
    def refuse(path: Path, *_arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match=r"w: Permission denied: name another folder"):
        Run(settings).execute()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"limit": 0}, "1 or more"),
        ({"seed": 2**32}, "seed"),
        ({"save_model": Path("model.pt")}, r"\*\.safetensors"),
        ({"scheme": Scheme.from_yaml(SCHEMES / "minmax44.yaml")}, "calibration pictures"),
    ],
)
def test_impossible_settings(settings: RunSettings, changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(settings, **changes)


@pytest.mark.parametrize("name", ["cuda:4096", "meta", "no-such-device"])
def test_device_that_is_not_there(settings: RunSettings, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(settings, device=name).torch_device()


def test_device_that_is_there(settings: RunSettings) -> None:
    assert settings.torch_device() == torch.device("cpu")


def test_phases_measure_time_and_memory_of_their_own() -> None:
    phases = Phases()
    with phases.phase("large"):
        block = np.ones(200 * 2**20, np.uint8)
        del block
    with phases.phase("small"):
        pass
    large, small = phases.to_dict()["large"], phases.to_dict()["small"]
    assert list(phases.to_dict()) == ["large", "small"]
    assert large["seconds"] > small["seconds"] >= 0
    assert large["peak_memory_bytes"] >= small["peak_memory_bytes"] > 2**20


def test_summary_of_two_models_and_of_none() -> None:
    scores = {"AP": 12.3456, "mean_iou": 0.5}
    metrics = {"model": "vit_nano", "method": "ptq4sam", **scores, "float": {"AP": 20.0}}
    metrics["audit"] = {"passed": True, "report": ["audit passed"]}
    heads, header, first, second, audit = summary_table(metrics).splitlines()
    assert (heads.split(), header.split()) == (["mean"], ["vit_nano", "AP", "IoU"])
    assert first.split() == ["float", "20.000"]
    assert second.split() == ["quantized", "12.346", "0.500"]
    assert audit == "audit passed"
    del metrics["audit"]
    assert summary_table({**metrics, "encoder": "float"}).endswith("\nimage encoder float")
    sizes = {"mean_iou_small": 0.25, "mean_iou_medium": None, "mean_iou_large": float("nan")}
    told = summary_table({**metrics, **sizes}).splitlines()[-1]
    assert told == "quantized, mean IoU by size: small 0.250, medium none, large none"
    unscored = {"model": "vit_b", "masks": 7, "pictures": 2}
    assert summary_table(unscored) == "vit_b: 7 masks on 2 pictures"
