from __future__ import annotations

from pathlib import Path

from ptq4sam.report.writing import write_report
from ptq4sam.runs.recording import LONGEST_SIDE, MOST_PICTURES
from tests.report.synthetic import write_run


def test_a_sam_h_with_5000_pictures_stays_small(tmp_path: Path) -> None:
    """With pictures and masks of noise, which nothing compresses."""
    folder = write_run(
        tmp_path,
        model="vit_h",
        blocks=32,
        channels=1280,
        pictures=5000,
        worst=MOST_PICTURES,
        side=(LONGEST_SIDE, LONGEST_SIDE),
        large=True,
    )
    path = write_report(folder)
    assert path.stat().st_size < 20e6
    page = path.read_text()
    assert page.count("<svg") > 32 * (1 + 1 + 4 + 2)
    assert "5,000 pictures" in page
