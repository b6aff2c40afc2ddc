"""What every run is made of, whatever becomes of it: scores, a study, a trial of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptq4sam.data import ImageSet
from ptq4sam.errors import ConfigError
from ptq4sam.progress import Progress
from ptq4sam.prompts import PromptSource
from ptq4sam.runs.context import RunContext
from ptq4sam.runs.inputs import Inputs
from ptq4sam.runs.models import ModelOpener
from ptq4sam.runs.settings import RunSettings


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
        context: what all of them have in common.
        inputs: opens pictures and boxes.
        models: opens models, and quantizes.
    """

    context: RunContext
    inputs: Inputs
    models: ModelOpener

    @classmethod
    def of(cls, settings: RunSettings, progress: Progress, **more: Any) -> Parts:
        """The parts of a run that begins; arguments and errors as of `RunContext.of`."""
        context = RunContext.of(settings, progress, **more)
        inputs = Inputs(context)
        return cls(context, inputs, ModelOpener(context, inputs))

    def pictures(self) -> tuple[ImageSet, PromptSource]:
        """The pictures that are measured on, and their boxes; further errors as of `Inputs`.

        Raises:
            ConfigError: the run has none.
        """
        data = self.inputs.evaluated()
        if data is None:
            raise ConfigError("what is measured needs pictures: give some")
        return data
