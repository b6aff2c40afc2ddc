"""One phase of a distillation: its steps, its optimiser and its moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptq4sam import parallel
from ptq4sam.distillation.losses import (
    asked_for,
    at_places,
    distance,
    hardness,
    mask_distance,
    measured_iou,
    truth_loss,
)
from ptq4sam.distillation.prompts import Prompts
from ptq4sam.distillation.settings import DistillationSettings, Phase
from ptq4sam.distillation.views import Batch
from ptq4sam.operators.arithmetic import learning
from ptq4sam.quantization.modes import has_quantizers, quantizers
from ptq4sam.sam.model import Sam

_BETAS = (0.9, 0.98)


class Decoded(NamedTuple):
    """What a decoder makes of n prompts.

    Attributes:
        tokens: behind the transformer: predicted IoU, then masks [n, 5, dim].
        masks: logits of all four [n, 4, c, c], float32.
        ious: predicted [n, 4], float32.
    """

    tokens: Tensor
    masks: Tensor
    ious: Tensor


def decode(sam: Sam, features: Tensor, prompts: Prompts, previous: Tensor | None) -> Decoded:
    """All that a decoder gives for prompts, with gradients.

    Args:
        sam: whose.
        features: the image embedding of each prompt [n, channels, rows, columns].
        prompts: n objects.
        previous: logits of masks so far [n, 1, c, c].
    """
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    # Prompts stay in float32: bfloat16 would round a box to whole pixels.
    with torch.autocast(features.device.type, enabled=False):
        sparse = prompts.embedded(encoder)
        dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(features)
        if previous is not None:
            dense = encoder.mask_downscaling(previous)
    grid = (features.shape[-2], features.shape[-1])
    tokens, image = decoder.attend(features, encoder.dense_positions(), sparse, dense)
    masks, ious = decoder.heads(tokens, image, grid)
    return Decoded(tokens[:, : 1 + decoder.num_mask_tokens], masks.float(), ious.float())


def encoder_input(sam: Sam, pictures: Sequence[Tensor]) -> Tensor:
    """What an encoder takes of pictures in the prompts' square: [b, 3, side, side].

    Args:
        sam: whose encoder; its square may be smaller than that of prompts.
        pictures: uint8 [3, h, w] each.
    """
    geometry = sam.geometry
    ratio = geometry.encoder_side / geometry.prompt_side
    inputs = []
    for picture in pictures:
        pixels = picture.float()
        if ratio != 1:
            size = [max(1, round(ratio * length)) for length in picture.shape[1:]]
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        inputs.append(sam.preprocess(pixels))
    return torch.stack(inputs)


@contextlib.contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """Attention is torch's plain one on a CPU within the `with` block.

    The fused kernel's backward is slow where a few tokens attend to a few hundred.
    """
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def one_order(device: torch.device) -> Iterator[None]:
    """Add in one order on a CPU, whose threads add what is scattered as they come.

    Memory is not filled before it is written, which torch does beside it and which takes time.
    """
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    memory.fill_uninitialized_memory = before and filled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


@dataclass
class Trainer:
    """Student, optimiser and moving average of one phase.

    Args:
        student: it learns in place; a quantized one keeps its quantizers.
        teacher: compared with; None to learn from the truth alone.
        phase: what is done.
        settings: of the whole distillation.
        number: of the phase.
        frozen: names of parameters that stay as they are.
    """

    student: Sam
    teacher: Sam | None
    phase: Phase
    settings: DistillationSettings
    number: int = 0
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.step = 0
        self.device = self.student.device
        self.student.train()
        groups = self._groups()
        self._trained = [p for group in groups for p in group["params"]]
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._shares = [group.pop("share") for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=self.phase.rate, betas=_BETAS, fused=True)
        self._learners = [q for _, q in quantizers(self.student) if q.learned()]
        self.average = {k: v.detach().clone() for k, v in self.student.state_dict().items()}

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by how they are trained."""
        of_quantizers = {id(p) for _, q in quantizers(self.student) for p in q.parameters()}
        scales = [p for _, q in quantizers(self.student) for p in q.learned()]
        part = self.student if self.settings.train == "all" else self.student.image_encoder
        prefix = "" if part is self.student else "image_encoder."
        chosen = [
            parameter
            for name, parameter in part.named_parameters()
            if id(parameter) not in of_quantizers and f"{prefix}{name}" not in self.frozen
        ]
        decayed = self.settings.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [p for p in chosen if p.dim() > 1], "weight_decay": decayed, "share": 1.0},
            {"params": [p for p in chosen if p.dim() <= 1], "weight_decay": 0.0, "share": 1.0},
            {"params": scales, "weight_decay": 0.0, "share": self.settings.scale_rate},
        ]
        return [group for group in groups if group["params"]]

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; returns the loss ("loss") and its terms."""
        rate = self.phase.rate_at(self.step)
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = share * rate
        seeds = [self.settings.seed, self.number, self.step, parallel.rank()]
        generator = torch.Generator("cpu").manual_seed(_mixed(seeds))
        self.optimizer.zero_grad(set_to_none=True)
        with learning(self.student), plain_attention(self.device):
            loss, noted = self.loss(batch.to(self.device), generator)
            with one_order(self.device):
                loss.backward()  # type: ignore[no-untyped-call]
        self._share_gradients()
        nn.utils.clip_grad_norm_(self._trained, self.settings.clip)
        self.optimizer.step()
        for quantizer in self._learners:
            quantizer.constrain_()
        self.step += 1
        self._follow()
        return {"loss": float(loss.detach()), **noted}

    @torch.no_grad()
    def _follow(self) -> None:
        """The moving average takes the student's weights in, the first ones faster."""
        decay = min(self.settings.decay, (1 + self.step) / (10 + self.step))
        for name, value in self.student.state_dict().items():
            average = self.average[name]
            if value.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch, and its terms before their weights, with IoUs of the masks.

        Args:
            batch: on the student's device.
            generator: of the prompts, on the CPU.
        """
        terms = self.phase.terms
        teacher = self.teacher if terms.by_teacher else None
        with self._products():
            embedding = self.student.embed(encoder_input(self.student, batch.pictures))[0]
        target = None
        parts: dict[str, Tensor] = {}
        if teacher is not None:
            with torch.no_grad(), self._products():
                target = teacher.embed(encoder_input(teacher, batch.pictures))[0]
            parts["embedding"] = distance(embedding, target)
        noted = self._mask_terms(batch, embedding, target, generator, parts)
        total = torch.stack([terms.weight_of(name) * value for name, value in parts.items()]).sum()
        return total, {**{k: float(v.detach()) for k, v in parts.items()}, **noted}

    def _mask_terms(
        self,
        batch: Batch,
        embedding: Tensor,
        target: Tensor | None,
        generator: torch.Generator,
        parts: dict[str, Tensor],
    ) -> dict[str, float]:
        """Add what prompts tell to the terms; returns how good masks are."""
        terms = self.phase.terms
        if not terms.of_masks:
            return {}
        features = embedding[batch.owner]
        prompts, previous = self._asked(batch, features.detach(), generator)
        with self._products():
            ours = decode(self.student, features, prompts, previous)
        side = self.student.geometry.prompt_side
        places = 2 * batch.points / side - 1
        where = (places, batch.labels, batch.boxes, batch.seen[batch.owner], self._stride(batch))
        measured = measured_iou(ours.masks, *where)
        lone = prompts.lone
        losses = truth_loss(at_places(ours.masks, places), batch.labels, terms.focal, terms.dice)
        parts["truth"] = asked_for(losses, lone)
        parts["iou"] = distance(ours.ious, measured)
        best = measured[:, 1:].amax(1)
        noted = {"mean IoU": float(torch.where(lone, best, measured[:, 0]).mean())}
        if self.teacher is None or target is None or terms.token + terms.mask == 0:
            return noted
        with torch.no_grad(), self._products():
            theirs = decode(self.teacher, target[batch.owner], prompts, previous)
            known = measured_iou(theirs.masks, *where)
        weight = hardness(known, measured) if terms.hardness else torch.ones_like(known)
        parts["token"] = distance(ours.tokens, theirs.tokens)
        parts["mask"] = mask_distance(ours.masks, theirs.masks, weight)
        best = known[:, 1:].amax(1)
        return {**noted, "teacher's mean IoU": float(torch.where(lone, best, known[:, 0]).mean())}

    @torch.no_grad()
    def _asked(
        self, batch: Batch, features: Tensor, generator: torch.Generator
    ) -> tuple[Prompts, Tensor | None]:
        """Prompts of a drawn number of rounds, and the masks of the round before the last.

        Each further click is where the student is wrong by then.
        """
        stride, side = self._stride(batch), self.student.geometry.prompt_side
        sampling = self.settings.sampling
        prompts = Prompts.first(batch.boxes, batch.target, stride, side, sampling.boxes, generator)
        previous: Tensor | None = None
        rounds = int(torch.randint(sampling.rounds + 1, (), generator=generator, device="cpu"))
        for _ in range(rounds):
            with self._products():
                found = decode(self.student, features, prompts, previous)
            best = 1 + found.ious[:, 1:].argmax(1)
            chosen = torch.where(prompts.lone, best, torch.zeros_like(best))
            every = torch.arange(len(chosen), device=chosen.device)
            previous = found.masks[every, chosen][:, None]
            prompts = prompts.refined(previous[:, 0], batch.target, stride, generator)
        return prompts, previous

    def _stride(self, batch: Batch) -> float:
        return self.student.geometry.prompt_side / batch.target.shape[-1]

    def _products(self) -> torch.autocast:
        """The precision of products in a `with` block."""
        asked = self.settings.precision
        if asked is None:
            asked = "bfloat16" if self.device.type == "cuda" else "float32"
        enabled = asked == "bfloat16" and not has_quantizers(self.student)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def _share_gradients(self) -> None:
        """Give every process the mean of all gradients, and of what normalisations have seen."""
        if parallel.count() == 1:
            return
        for parameter in self._trained:
            # Another process may have asked something that needs it.
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        shared = [p.grad for p in self._trained if p.grad is not None]
        for module in self.student.modules():
            if isinstance(module, nn.BatchNorm2d):
                shared += [b for b in module.buffers() if b.is_floating_point()]
        parallel.average(shared)


def _mixed(numbers: Sequence[int]) -> int:
    """One seed of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed
