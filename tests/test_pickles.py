"""Files are read without running what they name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptq4sam.pickles import UNREADABLE, StandIn, load_pickle, refused_name


class Call:
    """A call that unpickling makes."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "harmless",
    [
        np.float64(0.5),
        np.bool_(True),
        np.arange(3),
        np.array(["a", "b"]),
        np.array([{}, None], dtype=object),
        np.dtype("f4"),
        np.float32,
        np.random.default_rng(0),
        {np.int64(3): Path("a"), Path("b"): 1},
        slice(1, 2),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_things_are_no_obstacle(tmp_path: Path, harmless: object, zipped: bool) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    content = {"weight": torch.arange(3.0), "beside": [harmless, 5]}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = load_pickle(tmp_path / "a.pth")
    assert found["weight"].equal(content["weight"])
    assert found["beside"][1] == 5
    # What was allowed for one file is not from then on.
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((os.system, "touch ran"), "posix.system"),
        ((eval, "open('ran', 'w')"), "eval"),
        ((np.load, "ran"), "numpy.load"),
        ((Path.touch, Path("ran")), "function call"),
        ((torch.nn.Linear, 2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_would_run_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: tuple[Any, ...],
    named: str,
    zipped: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Call(*call)}, "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UNREADABLE) as caught:
        load_pickle(Path("a.pth"))
    assert refused_name(caught.value) == named
    assert os.listdir() == ["a.pth"]


def test_a_stand_in_does_nothing(tmp_path: Path) -> None:
    """`getattr` is among the names; it must lead to nothing."""
    torch.save({"x": Call(getattr, Path, "touch")}, tmp_path / "a.pth")
    found = load_pickle(tmp_path / "a.pth")["x"]
    assert type(found) is StandIn
    assert not callable(found)
