"""Settings of reconstruction, the `recon` section of a scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq4sam.records import FieldError, Record


@dataclass(frozen=True)
class Reconstruction(Record):
    """How units are reconstructed (QDrop, Wei et al. 2022; BRECQ, Li et al. 2021; AdaRound).

    Attributes:
        batch_size: pictures a step, drawn with replacement; in the decoder groups of up to 100
            boxes of one picture.
        scale_lr: Adam's first learning rate of the activation scales, annealed to 0 by a cosine.
        warm_up: share of the steps without rounding regularizer, in [0, 1).
        weight: factor of the rounding regularizer.
        iters: steps a unit.
        b_range: exponent of the regularizer at the end of the warm-up and at the last step.
        keep_gpu: keep captured activations in a GPU's memory while there is room; else in the
            host's. No result depends on it.
        round_mode: "learned_hard_sigmoid" (AdaRound's rectified sigmoid).
        drop_prob: probability that an element stays float, in activations and unit inputs; 0 is
            off. (Published files only have 0.5.)
        rounding_lr: ours; Adam's learning rate of the rounding variables.
        learn_rounding: ours; learn the rounding of the weights.
        learn_scale: ours; learn the scales of the activations, and the zero points of LSQ+.
        granularity: ours; reconstruct whole attentions, MLPs and the like ("unit", as BRECQ and
            QDrop), one layer after another ("layer", as AdaRound), or units with both cross
            attentions of a decoder's block and the MLP between them as one ("joint", as CAR-SAM).
        loss: ours; what a unit learns by: its own answer ("output"), or what masks are made of
            ("prompt-aware", as SAQ-SAM): the image behind the decoder, of units of the encoder, and
            image and tokens behind them, of joint units, which it needs.
        patience: ours; steps without a lower loss after which the rest of the schedule passes
            within as many steps; 0 makes all steps.
        precision: ours; of the matrix products of a step: "float32", "bfloat16" (about half
            the time of a step on a CPU that has it), "tf32" (GPUs only). What is learned, the
            quantizers and all measured errors stay float32.
        cuda_graphs: ours; let a GPU repeat steps of one shape by itself, without being told each
            operation again. No result depends on it.
        weights_only: ours, and what --brecq sets; activations stay float while reconstructing, so
            that learn_scale becomes false and drop_prob 0.
    """

    batch_size: int = 1
    scale_lr: float = 4e-5
    warm_up: float = 0.2
    weight: float = 0.01
    iters: int = 20000
    b_range: tuple[float, float] = (20.0, 2.0)
    keep_gpu: bool = True
    round_mode: Literal["learned_hard_sigmoid"] = "learned_hard_sigmoid"
    drop_prob: float = 0.5
    rounding_lr: float = 1e-3
    learn_rounding: bool = True
    learn_scale: bool = True
    granularity: Literal["unit", "layer", "joint"] = "unit"
    loss: Literal["output", "prompt-aware"] = "output"
    patience: int = 0
    precision: Literal["float32", "bfloat16", "tf32"] = "float32"
    cuda_graphs: bool = True
    weights_only: bool = False

    def _validate(self) -> None:
        self._require(self.batch_size >= 1, "batch_size", "1 or more")
        self._require(self.scale_lr > 0, "scale_lr", "more than 0")
        self._require(self.rounding_lr > 0, "rounding_lr", "more than 0")
        self._require(0 <= self.warm_up < 1, "warm_up", "0 to below 1")
        self._require(self.weight >= 0, "weight", "0 or more")
        self._require(self.iters >= 1, "iters", "1 or more")
        self._require(self.patience >= 0, "patience", "0 or more")
        self._require(
            self.b_range[0] >= self.b_range[1] > 0, "b_range", "[start, end], start >= end > 0"
        )
        self._require(0 <= self.drop_prob < 1, "drop_prob", "0 to below 1")
        if self.loss == "prompt-aware" and (self.granularity, self.batch_size) != ("joint", 1):
            raise FieldError(
                "loss",
                f"prompt-aware given with granularity {self.granularity} and batch_size "
                f"{self.batch_size}: it needs granularity joint and batch_size 1",
            )
        if self.weights_only:
            object.__setattr__(self, "learn_scale", False)
            object.__setattr__(self, "drop_prob", 0.0)
        if not (self.learn_rounding or self.learn_scale):
            raise FieldError("learn_rounding", "nothing to learn: no rounding and no scale")
