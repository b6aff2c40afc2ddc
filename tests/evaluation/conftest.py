from __future__ import annotations

from pathlib import Path

import pytest

from ptq4sam.data import CocoDataset
from ptq4sam.data.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Six generated scenes of 320x256."""
    folder: Path = tmp_path_factory.mktemp("scenes")
    return CocoDataset(*write_scenes(folder, 6, seed=2))
