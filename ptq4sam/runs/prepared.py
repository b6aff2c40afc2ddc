"""A run up to its frozen model and its pictures, for studies that do more than score it."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass

from ptq4sam import parallel
from ptq4sam.data import ImageSet
from ptq4sam.errors import ConfigError
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.progress import Progress, silent
from ptq4sam.prompts import Clicks, PromptSource
from ptq4sam.runs.outputs import make_folders
from ptq4sam.runs.parts import Parts
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.reproducibility import fix_seeds
from ptq4sam.runs.settings import RunSettings
from ptq4sam.sam.model import Sam


@dataclass(frozen=True)
class Prepared:
    """What a study has.

    Attributes:
        sam: the frozen model.
        float_sam: the float model that it was made of.
        dataset: pictures.
        source: boxes on them.
    """

    sam: QuantizedSam
    float_sam: Sam
    dataset: ImageSet
    source: PromptSource


class Preparation:
    """Quantizes or loads a model as a run does, and opens the pictures."""

    def __init__(self, settings: RunSettings, progress: Progress = silent) -> None:
        self.settings = settings
        self._parts = Parts.of(settings, progress)

    def pictures(self) -> tuple[ImageSet, PromptSource]:
        """The pictures and their boxes.

        Raises:
            ConfigError: none were asked for, or they have clicks.
        """
        data = self._parts.pictures()
        if isinstance(data[1], Clicks):
            raise ConfigError("a study prompts with boxes, not clicks: use ground-truth prompts")
        return data

    def prepare(self) -> Prepared:
        """Quantize, or load what is quantized; a killed run goes on from its journal.

        Raises:
            ConfigError: nothing is to be quantized, or the float model is not at hand.
        """
        fix_seeds(self.settings.seed)
        make_folders(self.settings)
        dataset, source = self.pictures()
        models = self._parts.models.open()
        sam, float_sam = models.sam, models.reference
        if not isinstance(sam, QuantizedSam):
            raise ConfigError(
                "the model is not quantized: give a scheme, as exp/ptq4sam-s44.yaml, or a "
                "quantized checkpoint"
            )
        if sam.scheme.compat == "published":
            raise ConfigError(
                "a model with compat: published is random, and not on its grid: use compat: "
                "faithful"
            )
        if not isinstance(float_sam, Sam):
            raise ConfigError(
                f"{self.settings.checkpoint} is compared with the float model that it was made of: "
                "give its weights, the float checkpoint"
            )
        return Prepared(sam, float_sam, dataset, source)

    def forget_journal(self) -> None:
        """All that the journal was for is in the results now."""
        if parallel.is_first():
            shutil.rmtree(self.settings.work_dir / JOURNAL, ignore_errors=True)


def digest(sam: Sam) -> str:
    """Identifies a model by all that it holds."""
    found = hashlib.sha256()
    for name, value in sam.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
