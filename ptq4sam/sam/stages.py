"""A network as a sequence of units with a state between them.

A forward pass runs the stages one after the other. Whoever wants to stop between two units, keep
what flows there and go on later (calibration, reconstruction, measurement layer by layer) takes the
same stages, so that there is one description of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

State = tuple[Tensor, ...]
"""What flows between units."""


@dataclass(frozen=True)
class Stage:
    """A unit and the arithmetic around it.

    Attributes:
        name: path of the unit in the network.
        unit: called with tensors as positional arguments, answers with one.
        enter: the unit's arguments, from the state before it.
        leave: the state behind it, from the state before it and the unit's answer.
    """

    name: str
    unit: nn.Module
    enter: Callable[[State], tuple[Tensor, ...]]
    leave: Callable[[State, Tensor], State]

    def run(self, state: State) -> State:
        """From the state before the unit to the state behind it."""
        return self.leave(state, self.unit(*self.enter(state)))

    def below(self, path: str) -> Stage:
        """The same stage, named from a network that holds this one's under `path`."""
        return Stage(f"{path}.{self.name}", self.unit, self.enter, self.leave)


def run_stages(stages: Iterable[Stage], state: State) -> State:
    """Run stages one after the other."""
    for stage in stages:
        state = stage.run(state)
    return state
