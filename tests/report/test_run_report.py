from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from ptq4sam.cli import main
from ptq4sam.files import write_json
from ptq4sam.model.distributions import (
    AttentionRecord,
    ChannelRanges,
    Distributions,
    Histogram,
    Keys,
    Range,
    Softmax,
)
from ptq4sam.report.distribution_plots import softmax_plot
from ptq4sam.report.run_sections import softmax_section
from ptq4sam.report.writing import write_report
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.record import RECORD, RunRecord
from tests.report.synthetic import write_run
from tests.tiny_runs import Quantized

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    return told[0]


def test_a_real_run_is_reported(quantized: Quantized, tmp_path: Path) -> None:
    record = RunRecord.read(quantized.work_dir)
    assert record.distributions is not None
    assert len(record.distributions.attentions) == 9
    assert len(record.distributions.layers) == 42
    assert sum(part.size for part in record.file) == quantized.path.stat().st_size
    assert len(record.scores) == quantized.metrics["pictures"]
    assert len(record.worst) == len(record.scores)
    path = write_report(quantized.work_dir, tmp_path / "elsewhere.html")
    page = path.read_text()
    assert headings(page) == [
        "Scores",
        "Pictures",
        "Post-key activations",
        "Softmax outputs",
        "Ranges by channel",
        "Sensitivity",
        "Size and operations",
        "Run",
    ]
    assert f"{quantized.metrics['AP']:.2f}" in page
    assert f"{quantized.metrics['float']['mean_iou']:.3f}" in page


def test_what_a_page_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"written to {folder / 'report.html'}, ")
    page = (folder / "report.html").read_text()
    assert "vit_nano: W4A4, BIG + AGQ + reconstruction" in page
    assert "float 36.50, change -5.00" in page
    assert page.count("2 peaks before, 1 peak after folding the signs") == 2 * 3
    assert page.count('class="picture"') == 3
    first, second = (page.index(f"{number}. {number - 1:012}.jpg") for number in (1, 2))
    assert first < second
    # IoUs of the float model are mostly a tenth higher, of all pictures.
    assert re.search(r"over \d+ pictures: -\d\.\d \(95%: -[\d.]+ to -[\d.]+\): a difference", page)
    assert "chosen τ = 2" in page
    assert "has not ended" not in page
    # The formula of `ptq4sam cost`, which has tests of its own.
    assert re.search(r"[\d.]+ times less storage and [\d.]+ times fewer bit operations", page)
    # Not a byte of it comes from elsewhere.
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", page) == []


def test_two_reports_of_a_run_are_the_same_and_name_nothing_twice(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert write_report(folder).read_text() == page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) > 50
    assert len(set(names)) == len(names)


def test_sensitivity_is_shown_where_it_was_measured(folder: Path) -> None:
    assert "ptq4sam sensitivity" in write_report(folder).read_text()

    def effect(agreement: float) -> dict[str, float | None]:
        return {
            "embedding_sqnr_db": None,
            "embedding_relative_error": 0.0,
            "logits_sqnr_db": 17.25,
            "logits_relative_error": 0.1,
            "agreement": agreement,
            "mean_iou": 0.5,
            "AP": None,
        }

    targets = [
        {
            "name": f"image_encoder.blocks.{index}.attn",
            "grain": "unit",
            "rank": index + 1,
            "only": effect(0.8 + 0.01 * index),
            "all_but": effect(0.7),
        }
        for index in range(20)
    ]
    content = {"targets": targets, "pictures": {"proxy": 4, "measured": 32}}
    write_json(content, folder / "sensitivity.json")
    page = write_report(folder).read_text()
    assert "The 15 most sensitive of 20 parts by unit" in page
    assert "17.2" in page
    assert "Measured on 4 pictures, the worst on 32" in page
    # A folder with nothing but a study.
    for name in ("metrics.json", "scheme.yaml", RECORD):
        (folder / name).unlink()
    (folder / "run.log").write_text("measuring ...\n")
    page = write_report(folder).read_text()
    assert headings(page) == ["Sensitivity", "Run"]
    assert "has not ended" not in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"targets": 3}, "sensitivity.json is damaged"),
        ({"targets": [{"grain": "unit"}]}, "sensitivity.json is damaged"),
    ],
)
def test_a_damaged_sensitivity(
    folder: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(content, folder / "sensitivity.json")
    assert message in refusal(capsys, folder)


def test_an_unfinished_run_is_reported_as_far_as_it_is(folder: Path) -> None:
    # An earlier run left its results in the same folder.
    (folder / "run.log").write_text("reconstructed a.attn\nstopped: disk is full\n")
    losses = {"file": "001.safetensors", "before": 4.0, "after": 1.0, "steps": 3, "curve": [2, 1]}
    parts = {"calibrated": {"file": "000.safetensors", "folded": []}, "a.attn": losses}
    (folder / JOURNAL).mkdir()
    write_json({"fingerprint": {}, "parts": parts}, folder / JOURNAL / "journal.json")
    page = write_report(folder).read_text()
    assert "This run has not ended" in page
    assert "1 units are reconstructed" in page
    assert "stopped: disk is full" in page
    assert headings(page) == ["Reconstruction", "Run"]


def test_a_run_that_began_again_does_not_show_the_results_before(folder: Path) -> None:
    (folder / "run.log").write_text("load ...\n")
    page = write_report(folder).read_text()
    assert "This run has not ended" in page
    assert headings(page) == ["Run"]


def test_a_run_of_an_older_version_has_scores_only(folder: Path) -> None:
    (folder / RECORD).unlink()
    page = write_report(folder).read_text()
    assert "This run has no record.json" in page
    assert "Pictures" not in headings(page)
    assert "Scores" in headings(page)


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which is not there" in refusal(capsys, tmp_path / "nowhere")
    assert "is no work directory of a run" in refusal(capsys, tmp_path)
    (tmp_path / "file").write_text("")
    assert "which is a file" in refusal(capsys, tmp_path / "file")


def test_damaged_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = folder / RECORD
    whole = record.read_text()
    record.write_text(whole[: len(whole) // 2])
    assert "record.json is not JSON" in refusal(capsys, folder)
    content = json.loads(whole)
    content["worst"][0]["width"] = "wide"
    record.write_text(json.dumps(content))
    assert "the record is damaged" in refusal(capsys, folder)
    record.write_text(json.dumps({**content, "version": 99}))
    assert "is of format 99" in refusal(capsys, folder)
    record.write_text(whole)
    (folder / "metrics.json").write_text("[1]")
    assert "metrics.json is damaged" in refusal(capsys, folder)
    (folder / "metrics.json").write_text("{}")
    assert "metrics.json is damaged" in refusal(capsys, folder)


def test_an_output_that_is_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which is a folder: name a file" in refusal(capsys, folder, "--output", folder)


def test_text_of_others_stays_text(folder: Path) -> None:
    (folder / "run.log").write_text("<script>alert(1)</script>\nthe run has ended: here\n")
    page = write_report(folder).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_operations_are_those_of_what_is_quantized(folder: Path) -> None:
    """A file may have a float encoder, which the command that scores it was not told."""

    def storage() -> float:
        told = re.search(r"([\d.]+) times less storage", write_report(folder).read_text())
        assert told is not None
        return float(told[1])

    whole = storage()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "image encoder float" not in write_report(folder).read_text()
    told = {"encoder": "float", "encoder_quantized": False}
    write_json({**metrics, **told}, folder / "metrics.json")
    assert storage() < whole / 2
    assert "image encoder float" in write_report(folder).read_text()


def test_a_page_says_how_masks_are_scored(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"prompts": "yolox:FILE", "evaluator": "pycocotools"}
    told = "AP and AR are in percent by pycocotools, of masks that yolox:FILE prompts."
    factors = {
        (True, False): " times the IoU that the model predicts",
        (False, False): " times the mean probability inside the mask",
        (True, True): "",
    }
    for (by_iou, kept), factor in factors.items():
        asked = {"prompting": {"use_sam_iou": by_iou, "keep_scores": kept}}
        write_json({**metrics, "asked": asked}, folder / "metrics.json")
        write_report(folder, folder / "report.html")
        page = html.unescape((folder / "report.html").read_text())
        assert f"{told} A mask's score is its prompt's{factor}. Mean IoU" in page


def test_levels_of_softmax_outputs_are_said_as_what_they_are() -> None:
    seen = Histogram(-24, 0, (1, 2, 3, 4))
    grids = {
        "levels a factor of √2 apart": Softmax(seen, 4, 0.9, tau=2),
        "evenly spaced levels, step 0.05": Softmax(seen, 4, 0.05),
        "levels of a grid of its own, whole multiples of 0.1, 4 levels up to 0.7": Softmax(
            seen, 2, 0.1, points=(0.1, 0.3, 0.7)
        ),
    }
    ranges = ChannelRanges(1, 1, (-1.0,), (1.0,))
    keys = Keys(seen, ranges)
    records = [AttentionRecord("a", False, keys, Range(4, -1, 1), s, None) for s in grids.values()]
    for told, record in zip(grids, records, strict=True):
        assert told in softmax_plot(record).caption
    titles = [
        [block.caption for block in softmax_section(Distributions((one,), ())).blocks[1:]]
        for one in records
    ]
    assert titles == [["Chosen granularity of each attention"], [], []]
