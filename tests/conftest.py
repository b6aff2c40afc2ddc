"""What tests share: the shared folder, and golden vectors as parameters.

A test marked `@pytest.mark.golden("observer")` that takes `golden_case` runs once for each case of
that group in the folder of --golden-dir; put "golden" into its name, so that -k golden finds it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import ptq4sam  # noqa: F401 before torch, which then knows how its threads wait

# isort: split
import pytest
import torch

from ptq4sam.allocator import keep_freed_memory
from ptq4sam.machine import cores
from ptq4sam.quantization import fused
from ptq4sam.threads import COUNTS
from tests import golden_cases

_MOST_WORKERS = 4
"""Each holds more than a GiB of memory."""

_TESTS = Path(__file__).parent
_SHARED = Path(os.environ.get("PTQ4SAM_SHARED", _TESTS.parent.parent / "shared"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=_SHARED / "golden" if (_SHARED / "golden").is_dir() else _TESTS / "golden",
        help="folder with reference.json and reference.npz (default: %(default)s)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What -n auto means: the cores that are ours, those of a second thread included."""
    return min(cores(), _MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    # Compiling takes seconds a kernel, more than it saves here, and which test meets a kernel would
    # depend on those before it. Tests of kernels take the fixture `kernels`; processes that tests
    # start have none either. PTQ4SAM_COMPILE=1 runs all tests with kernels.
    os.environ.setdefault(fused.SWITCH, "0")
    # Found out now: a test that switches kernels on must not decide for those after it.
    fused.compiles(torch.device("cpu"))
    if config.getoption("dist", "no") == "load":
        # Neighbours stay in a process, which makes what they share once; whoever has none left
        # takes half of another's.
        config.option.dist = "worksteal"
    if workers := config.getoption("numprocesses", None):
        # They share the cores, also with processes that their tests start.
        for name in COUNTS:
            os.environ.setdefault(name, str(max(1, cores() // workers)))
    config.addinivalue_line(
        "markers", "golden(*groups): run the test once for each golden case of these groups"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" not in metafunc.fixturenames:
        return
    directory: Path = metafunc.config.getoption("--golden-dir").resolve()
    for name in ("reference.json", "reference.npz"):
        if not (directory / name).is_file():
            raise pytest.UsageError(
                f"--golden-dir {directory} has no {name}: give a folder of golden vectors"
            )
    groups = [g for mark in metafunc.definition.iter_markers("golden") for g in mark.args]
    found = list(golden_cases.cases(directory, *groups))
    metafunc.parametrize("golden_case", found, ids=[case.key for case in found])


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of golden vectors in use."""
    directory: Path = request.config.getoption("--golden-dir")
    return directory.resolve()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with shared data and weights; tests that need it are skipped without."""
    if not _SHARED.is_dir():
        pytest.skip(f"no shared folder at {_SHARED} (set PTQ4SAM_SHARED)")
    return _SHARED


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are quantized by kernels, which are compiled at a function's first use."""
    monkeypatch.setenv(fused.SWITCH, "1")
    monkeypatch.setattr(fused._compiler, "_usable", {})


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """Take back what a command set up for its log: a test must not see another's level."""
    logger = logging.getLogger("ptq4sam")
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
    logger.propagate = propagate
