"""What is kept of tensors is made anew when one of them changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq4sam.quantization.memo import Memo


class Doubled:
    """Twice a tensor, and how often that was computed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.made, self.memo = tensor, 0, Memo[Tensor]()

    def __call__(self, *others: int) -> Tensor:
        def make() -> Tensor:
            self.made += 1
            return 2 * self.tensor.detach()

        return self.memo.get(make, (self.tensor,), *others)


def test_a_value_is_made_once() -> None:
    doubled = Doubled(torch.ones(3))
    assert doubled() is doubled()
    assert doubled.made == 1
    doubled(1)
    doubled(1)
    assert doubled.made == 2


def by_state(parameter: Tensor) -> None:
    module = nn.Module()
    module.register_parameter("own", parameter)  # type: ignore[arg-type]
    module.load_state_dict({"own": torch.full((3,), 7.0)})


def by_other_data(parameter: Tensor) -> None:
    parameter.data = torch.full((3,), 5.0)


@torch.no_grad()
def in_place(parameter: Tensor) -> None:
    parameter.abs_().clamp_(min=1.5)


@torch.no_grad()
def in_a_view(parameter: Tensor) -> None:
    parameter[1:] += 1


@pytest.mark.parametrize("change", [by_state, by_other_data, in_place, in_a_view])
def test_a_changed_tensor_makes_it_anew(change: Callable[[Tensor], None]) -> None:
    doubled = Doubled(nn.Parameter(torch.ones(3), requires_grad=False))
    before = doubled().clone()
    change(doubled.tensor)
    assert torch.equal(doubled(), 2 * doubled.tensor)
    assert not torch.equal(doubled(), before)


def test_another_tensor_makes_it_anew_wherever_it_lies() -> None:
    doubled = Doubled(torch.zeros(3))
    for value in range(1, 50):
        # Each may get the place of the one before it.
        doubled.tensor = torch.full((3,), float(value))
        assert doubled()[0] == 2 * value


def test_a_type_of_its_own_makes_it_anew() -> None:
    parameter = nn.Parameter(torch.ones(3), requires_grad=False)
    doubled = Doubled(parameter)
    doubled()
    parameter.data = parameter.data.double()
    assert doubled().dtype == torch.float64


def test_a_cleared_memo_makes_it_anew() -> None:
    doubled = Doubled(torch.ones(3))
    doubled()
    doubled.tensor.data.add_(1)
    assert doubled()[0] == 2
    doubled.memo.clear()
    assert doubled()[0] == 4


def test_copies_are_empty() -> None:
    doubled = Doubled(torch.ones(3))
    doubled()
    for copied in (copy.deepcopy(doubled.memo), pickle.loads(pickle.dumps(doubled.memo))):
        assert copied._value is None
        assert copied._sources == ()


def test_nothing_is_kept_of_what_torch_does_not_count() -> None:
    with torch.inference_mode():
        doubled = Doubled(torch.ones(3))
        doubled()
        doubled.tensor.add_(1)
        assert doubled()[0] == 4
    assert doubled() is not doubled()
