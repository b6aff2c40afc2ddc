"""What tests of several verbs compare with."""

from __future__ import annotations

import pytest

from tests.tiny_runs import Tiny, read_metrics, run


@pytest.fixture(scope="session")
def truth_metrics(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The float model with annotated boxes."""
    work_dir = tmp_path_factory.mktemp("float")
    run("evaluate", *tiny.model(), *tiny.data(), "--work-dir", work_dir)
    assert (work_dir / "run.log").read_text().count("evaluate") >= 2
    return read_metrics(work_dir)
