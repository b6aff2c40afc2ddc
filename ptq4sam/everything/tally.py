"""What became of the masks that were proposed: how many each filter dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ptq4sam.everything.settings import EverythingSettings

PREDICTED_IOU, STABILITY = "pred_iou_thresh", "stability_score_thresh"
CUT_OFF = "crop_n_layers"
DUPLICATES, CROP_DUPLICATES = "box_nms_thresh", "crop_nms_thresh"

_REASONS = {
    PREDICTED_IOU: "a predicted IoU not above {value}",
    STABILITY: "a stability below {value}",
    CUT_OFF: "a box that the edge of its crop cuts off",
    DUPLICATES: "being like a better mask (box IoU above {value})",
    CROP_DUPLICATES: "being like a mask of a smaller crop (box IoU above {value})",
}
"""Why masks are dropped, in the order of the filters, by the setting that decides it."""
_MENDED = {
    PREDICTED_IOU: "lower",
    STABILITY: "lower",
    CUT_OFF: "lower",
    DUPLICATES: "raise",
    CROP_DUPLICATES: "raise",
}


@dataclass
class Tally:
    """Numbers of masks; a generator adds to it picture by picture.

    Attributes:
        points: that were tried.
        masks: that the model proposed for them.
        dropped: by each filter, under the name of its setting.
        best_iou: highest predicted IoU of all proposed masks; 0 before there was one.
        best_stability: highest stability of those whose predicted IoU was high enough; else 0.
    """

    points: int = 0
    masks: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    best_iou: float = 0.0
    best_stability: float = 0.0

    @classmethod
    def joined(cls, parts: Iterable[Tally]) -> Tally:
        """The sum of several."""
        whole = cls()
        for part in parts:
            whole.points += part.points
            whole.masks += part.masks
            whole.dropped += part.dropped
            whole.best_iou = max(whole.best_iou, part.best_iou)
            whole.best_stability = max(whole.best_stability, part.best_stability)
        return whole

    @property
    def kept(self) -> int:
        """Masks that no filter dropped."""
        return self.masks - self.dropped.total()

    def lines(self, settings: EverythingSettings) -> list[str]:
        """What was dropped and, where nothing is left, which setting to change."""
        lines = [f"{self.points} points, {self.masks} masks proposed; dropped for"]
        lines += [
            f"  {self.dropped[name]:>7} {reason.format(value=getattr(settings, name))} ({name})"
            for name, reason in _REASONS.items()
            if self.dropped[name]
        ]
        if len(lines) == 1:
            lines = [f"{self.points} points, {self.masks} masks proposed, none dropped"]
        if self.masks and not self.kept:
            lines.append(self._advice())
        return lines

    def _advice(self) -> str:
        name = max(self.dropped, key=self.dropped.__getitem__)
        best = {PREDICTED_IOU: self.best_iou, STABILITY: self.best_stability}.get(name)
        seen = "" if best is None else f"; the highest was {best:.3f}"
        return f"nothing is left: {_MENDED[name]} {name}{seen}"
