"""What is made without values has the shapes of what is made with them, and draws nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.skeletons import shapes_alone
from tests.families.efficientvit.conftest import TINY_VARIANT as EFFICIENT
from tests.tiny_runs import SMALL


class Operations(TorchDispatchMode):
    """The names of torch's operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [SMALL, EFFICIENT.name, "tinysam"])
def test_a_sam_is_one_of_the_same_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, EFFICIENT.name, EFFICIENT)
    with shapes_alone(), Operations() as operations:
        made = build_sam(name).state_dict()
    assert operations.seen
    assert not [one for one in operations.seen if "normal" in one or "uniform" in one]
    assert {x.device.type for x in made.values()} == {"meta"}
    with torch.device("meta"):
        expected = build_sam(name).state_dict()
    assert {key: (x.shape, x.dtype) for key, x in made.items()} == {
        key: (x.shape, x.dtype) for key, x in expected.items()
    }


def test_what_is_no_draw_is_what_it_was() -> None:
    with shapes_alone():
        drawn = nn.init.normal_(tensor=torch.empty(2, 3))
        assert drawn.shape == torch.randn(2, 3).shape == (2, 3)
        assert torch.ones(2, device="cpu").add(1).sum() == 4
    x = torch.zeros(50, device="cpu")
    assert isinstance(nn.init.normal_(x), Tensor)
    assert x.std() > 0.5
