"""How boxes prompt a SAM, and how its masks are scored."""

from __future__ import annotations

from dataclasses import dataclass

from ptq4sam.records import Record


@dataclass(frozen=True)
class Prompting(Record):
    """How boxes prompt a SAM and how its masks are scored.

    Attributes:
        multimask: let the decoder propose three masks a box and keep the first of them, unless
            `best_in_multi_mask` chooses.
        best_in_multi_mask: of three masks a box keep the one with the highest predicted IoU.
        cascade: prompt a second time with the box and the first mask's logits.
        use_sam_iou: multiply the detector's score by the predicted IoU, else by the mean
            probability inside the mask.
        keep_scores: masks have their boxes' scores as they are.
        max_per_image: boxes used in a picture, highest scores first (COCO's AP counts 100); None
            for all.
        score_threshold: boxes below this detector score are not used.
    """

    multimask: bool = False
    best_in_multi_mask: bool = False
    cascade: bool = False
    use_sam_iou: bool = True
    keep_scores: bool = False
    max_per_image: int | None = 100
    score_threshold: float = 0.0

    def _validate(self) -> None:
        enough = self.max_per_image is None or self.max_per_image >= 1
        self._require(enough, "max_per_image", "1 or more, or null")
        self._require(0 <= self.score_threshold <= 1, "score_threshold", "0 to 1")
