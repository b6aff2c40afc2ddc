"""Train a small SAM, vit_nano or tiny_vit_nano, from a seed or from weights.

    python tools/train_vit_nano.py tools/vit_nano.yaml --data FOLDER --out FILE.safetensors

The file says what it learns from and for how long. With a teacher it begins with the teacher's
prompt encoder and mask decoder, and learns the teacher's embeddings too. A killed run resumes from
--state, with the same bits on a CPU. `torchrun --nproc-per-node 2 tools/train_vit_nano.py ...`
shares each batch between two processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before torch, which then knows how its threads wait.
import ptq4sam  # noqa: F401

# isort: split
import numpy as np
import torch
import yaml
from nano_data import Batch, Photographs, Source, WindowDataset, collate
from nano_losses import feature_loss, measured_iou, separation_loss, total_loss
from nano_model import build_model, resize_encoder
from nano_prompts import Prompts
from nano_teacher import DetectorFeatures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptq4sam.allocator import keep_freed_memory
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.tiny_vit.weights import fold_state
from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.sam.model import Sam

_log = logging.getLogger("train_vit_nano")

_DECAY = 0.999
_ROUNDS = (1.0, 0.35, 0.35)
_FEATURE_CHANNELS = 192
_AUXILIARY = "foretold."


@dataclass(frozen=True)
class Phase:
    """One stretch of training at one window size.

    The learning rate falls from the peak to the final one over all steps.

    Attributes:
        distil: weight of the distance of embeddings to the teacher's.
        masks: learn masks; else the teacher's embeddings alone.
    """

    window: int
    batch: int
    steps: int
    peak_rate: float
    final_rate: float
    distil: float = 0.0
    masks: bool = True


@dataclass(frozen=True)
class Detector:
    """A detector as ONNX, and the names of its feature maps."""

    file: str
    maps: list[str]


@dataclass(frozen=True)
class Settings:
    """What a settings file holds; paths are below --data."""

    phases: list[Phase]
    model: str = "vit_nano"
    teacher: str | None = None
    sources: list[Source] = dataclasses.field(default_factory=list)
    detector: Detector | None = None
    objects: int = 6
    scene_share: float = 0.25
    seed: int = 0

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a YAML file.

        Raises:
            TypeError: it names a setting that there is not.
        """
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        given["phases"] = [Phase(**phase) for phase in given["phases"]]
        given["sources"] = [Source(**source) for source in given.get("sources", [])]
        if given.get("detector") is not None:
            given["detector"] = Detector(**given["detector"])
        return cls(**given)


def rate_at(phase: Phase, step: int) -> float:
    """Linear warm-up over 200 steps, then cosine from the peak to the final rate."""
    warm = min(1.0, (step + 1) / 200)
    cosine = 0.5 + 0.5 * np.cos(np.pi * step / phase.steps)
    return float(warm * (phase.final_rate + (phase.peak_rate - phase.final_rate) * cosine))


@contextlib.contextmanager
def _one_order(device: torch.device) -> Iterator[None]:
    """Add in one order what is scattered: threads of a CPU add it as they come."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Trainer:
    """Model, optimiser and moving average of one phase."""

    def __init__(
        self,
        phase: Phase,
        index: int,
        seed: int,
        device: str = "cpu",
        name: str = "vit_nano",
        teacher: Sam | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.phase, self.index, self.device = phase, index, torch.device(device)
        self.model = build_model(phase.window, name).train()
        self.teacher = teacher
        if teacher is not None:
            self.model.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
            self.model.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())
        for parameter in self.model.parameters():
            if parameter.dim() == 4 and parameter.shape[0] == 1:
                nn.init.normal_(parameter, std=0.02)
        neck = self.model.image_encoder.neck[0]
        self.foretell = nn.Sequential(
            LayerNorm2d(neck.in_channels), nn.Conv2d(neck.in_channels, _FEATURE_CHANNELS, 1)
        )
        self.model.to(self.device)
        self.foretell.to(self.device)
        trained = [*self.model.parameters(), *self.foretell.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.05},
                {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=phase.peak_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.average = {k: v.detach().clone() for k, v in self._weights().items()}
        self.step = 0
        self.log: list[dict[str, float]] = []
        self._upscaled = self._blocks = torch.empty(0)
        self.model.mask_decoder.output_upscaling.register_forward_hook(self._keep_upscaled)
        neck.register_forward_pre_hook(self._keep_blocks)

    def _keep_upscaled(self, _module: object, _inputs: object, output: Tensor) -> None:
        self._upscaled = output

    def _keep_blocks(self, _module: object, inputs: tuple[Tensor, ...]) -> None:
        self._blocks = inputs[0]

    def _weights(self) -> dict[str, Tensor]:
        heads = {_AUXILIARY + name: value for name, value in self.foretell.state_dict().items()}
        return {**self.model.state_dict(), **heads}

    def _load(self, state: dict[str, Tensor]) -> None:
        heads = {
            k.removeprefix(_AUXILIARY): v for k, v in state.items() if k.startswith(_AUXILIARY)
        }
        if heads:
            self.foretell.load_state_dict(heads)
        own = {k: v for k, v in state.items() if not k.startswith(_AUXILIARY)}
        self.model.load_state_dict(resize_encoder(own, self.model.state_dict()))

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Start from the averaged weights of an earlier phase, or from those of a file."""
        self._load(state)
        self.average = {k: v.detach().clone() for k, v in self._weights().items()}

    def train_step(self, batch: Batch) -> float:
        """One optimiser step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.phase, self.step)
        generator = torch.Generator().manual_seed(self.step)
        loss = self.loss(batch.to(self.device), generator)
        self.optimizer.zero_grad(set_to_none=True)
        with _one_order(self.device):
            loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self._weights().items():
                average = self.average[name]
                average.lerp_(value, 1 - decay) if value.is_floating_point() else average.copy_(
                    value
                )
        return float(loss.detach())

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Loss of one batch: all objects once, some again with one more click and the mask."""
        noted: dict[str, float] = {}
        embedding, distance = self._embedding(batch.pixels, noted)
        if not self.phase.masks:
            self.log.append(noted)
            return distance
        stride = self.phase.window / (4 * embedding.shape[-1])
        target = F.avg_pool2d(batch.masks[:, None].float() / 255, int(stride))[:, 0]
        seen = F.avg_pool2d((batch.pixels[:, :1] >= 0).float(), int(stride))[batch.owner, 0]
        loss = self._foretold(batch, noted) + distance
        prompts = Prompts.first(batch.boxes, target, stride, self.phase.window, generator)
        chosen = torch.arange(len(batch.boxes), device=self.device)
        logits: Tensor | None = None
        for number, share in enumerate(_ROUNDS):
            if number:
                kept = torch.randperm(len(chosen), generator=generator)
                kept = kept[: max(1, round(share * len(chosen)))].to(self.device)
                chosen, logits = chosen[kept], logits[kept]
                prompts = prompts[kept].refined(logits[:, 0], target[chosen], stride, generator)
            masks, ious, truth, term = self._round(
                batch, embedding, seen, prompts, chosen, logits, stride
            )
            loss = loss + term * (1.0 if number == 0 else share)
            if number == 0:
                loss = loss + self._separation(batch, embedding, target, stride)
            note_round(noted, number, prompts.by_box, ious, truth)
            best = 1 + ious[:, 1:].argmax(1)
            lone = ~prompts.by_box if number == 0 else torch.zeros_like(prompts.by_box)
            picked = torch.where(lone, best, torch.zeros_like(best))
            logits = masks[torch.arange(len(masks)), picked][:, None].detach()
        self.log.append(noted)
        return loss

    def _round(
        self,
        batch: Batch,
        embedding: Tensor,
        seen: Tensor,
        prompts: Prompts,
        chosen: Tensor,
        logits: Tensor | None,
        stride: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masks of some objects, their predicted and measured IoUs, and the loss."""
        owner = batch.owner[chosen]
        features = embedding[owner]
        offsets = batch.offsets[owner]
        # Prompts stay in float32: bfloat16 would round a box to whole pixels.
        sparse = prompts.embedded(self.model.prompt_encoder, offsets.float())
        if logits is None:
            dense = self.model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            dense = dense.expand_as(features)
        else:
            dense = self.model.prompt_encoder.mask_downscaling(logits)
        positions = self._positions(batch.offsets // 8, embedding.shape[-1])[owner]
        with torch.autocast(self.device.type, torch.bfloat16):
            masks, ious = self.model.mask_decoder.predict_all(features, positions, sparse, dense)
        masks, ious = masks.float(), ious.float()
        places = 2 * batch.points[chosen] / self.phase.window - 1
        labels = batch.labels[chosen]
        truth = measured_iou(masks, places, labels, batch.boxes[chosen], seen[chosen], stride)
        lone = ~prompts.by_box if logits is None else torch.zeros_like(prompts.by_box)
        return masks, ious, truth, total_loss(masks, ious, places, labels, truth, lone)

    def _embedding(self, pixels: Tensor, noted: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Embeddings of windows, and the weighted distance to the teacher's."""
        model = self.model
        normalized = (pixels.float() - model.pixel_mean) / model.pixel_std
        normalized = torch.where(pixels < 0, 0.0, normalized)
        with torch.autocast(self.device.type, torch.bfloat16):
            embedding = model.image_encoder(normalized)
            if self.teacher is None or self.phase.distil == 0:
                return embedding, torch.zeros((), device=self.device)
            with torch.no_grad():
                target = self.teacher.image_encoder(normalized).float()
        distance = F.mse_loss(embedding.float(), target) / target.var()
        noted["distance"] = float(distance.detach())
        return embedding, self.phase.distil * distance

    def _foretold(self, batch: Batch, noted: dict[str, float]) -> Tensor:
        if batch.features.shape[1] == 0:
            return torch.zeros((), device=self.device)
        loss = feature_loss(self.foretell(self._blocks.float()), batch.features.float())
        noted["features"] = float(loss.detach())
        return loss

    def _separation(self, batch: Batch, embedding: Tensor, target: Tensor, stride: float) -> Tensor:
        coarse = F.avg_pool2d(target[:, None], 4)[:, 0]
        own = embedding[batch.owner].float()
        early = separation_loss(own, coarse, batch.boxes, 4 * stride)
        return separation_loss(self._upscaled.float(), target, batch.boxes, stride) + early

    def _positions(self, cells: Tensor, size: int) -> Tensor:
        whole = self.model.prompt_encoder.dense_positions()[0]
        return torch.stack([whole[:, y : y + size, x : x + size] for x, y in cells.tolist()])

    def state(self) -> dict[str, object]:
        """Everything a resumed run needs."""
        return {
            "phase": self.index,
            "step": self.step,
            "model": self._weights(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Continue from `state`."""
        self.step = state["step"]
        self._load(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])


def note_round(
    noted: dict[str, float], number: int, by_box: Tensor, ious: Tensor, truth: Tensor
) -> None:
    """Write down how good a round's masks are, and how wrong their predicted IoUs."""
    best = truth.gather(1, 1 + ious[:, 1:].argmax(1, keepdim=True))[:, 0]
    for name, chosen, values in (
        (f"box{number}", by_box, truth[:, 0]),
        (f"click{number}", ~by_box, best if number == 0 else truth[:, 0]),
    ):
        if chosen.any():
            noted[name] = float(values[chosen].mean())
    noted["off"] = float((ious.detach() - truth).abs().mean())


def average_gradients(parameters: list[Tensor]) -> None:
    """Give every process the mean of all gradients; processes take the same branches of a step."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world_size()
    torch.distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def world_size() -> int:
    """Number of processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; the first one writes."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def run_phase(trainer: Trainer, dataset: WindowDataset, state: Path) -> None:
    """Train to the end of the phase, saving the state every few minutes."""
    phase = trainer.phase
    share = phase.batch // world_size()
    order = [
        step * phase.batch + rank() * share + index
        for step in range(trainer.step, phase.steps)
        for index in range(share)
    ]
    loader = torch.utils.data.DataLoader(
        dataset, share, sampler=order, collate_fn=collate, num_workers=1, prefetch_factor=8
    )
    started, saved, losses = time.monotonic(), time.monotonic(), []
    for batch in loader:
        losses.append(trainer.train_step(batch))
        if trainer.step % 100 == 0 and rank() == 0:
            pace = (time.monotonic() - started) / len(losses)
            names = sorted({name for noted in trainer.log for name in noted})
            means = {n: np.mean([e[n] for e in trainer.log if n in e]) for n in names}
            _log.info(
                "window %d step %d/%d loss %.3f %s, %.2f s a step",
                phase.window,
                trainer.step,
                phase.steps,
                float(np.mean(losses[-100:])),
                " ".join(f"{name} {value:.3f}" for name, value in means.items()),
                pace,
            )
            trainer.log.clear()
        if time.monotonic() - saved > 120 and rank() == 0:
            write_atomically(trainer.state(), state)
            saved = time.monotonic()
    if rank() == 0:
        write_atomically(trainer.state(), state)


def write_atomically(state: dict[str, object], path: Path) -> None:
    """Save through a temporary file, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(average: dict[str, Tensor], path: Path) -> None:
    """Write the averaged weights as float16 safetensors."""
    temporary = path.with_suffix(".tmp")
    own = fold_state({k: v for k, v in average.items() if not k.startswith(_AUXILIARY)})
    save_file({k: v.to(torch.float16).contiguous() for k, v in own.items()}, temporary)
    os.replace(temporary, path)
    _log.info("wrote %s", path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the sources")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors)")
    parser.add_argument("--teacher", type=Path, help="weights of the teacher; else the embedded")
    parser.add_argument("--state", type=Path, default=Path("train_vit_nano.pt"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Train all phases and export."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse_arguments()
    settings = Settings.read(arguments.settings)
    keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(arguments.threads)
    photographs = Photographs(arguments.data, settings.sources) if settings.sources else None
    _log.info("%d photographs", len(photographs) if photographs else 0)
    teacher = None
    if settings.detector is not None:
        file = arguments.data / settings.detector.file
        teacher = DetectorFeatures(file, settings.detector.maps)
    distilled_from = None
    if settings.teacher is not None:
        distilled_from = load_sam(settings.teacher, arguments.teacher, arguments.device)
        distilled_from.requires_grad_(False)
    state = torch.load(arguments.state, weights_only=True) if arguments.state.exists() else None
    first = state["phase"] if state is not None else 0
    weights: dict[str, Tensor] | None = None
    if arguments.init is not None:
        weights = {name: value.float() for name, value in load_file(arguments.init).items()}
    for index, phase in enumerate(settings.phases):
        if index < first:
            continue
        trainer = Trainer(
            phase, index, settings.seed, arguments.device, settings.model, distilled_from
        )
        if weights is not None:
            trainer.load_weights(weights)
        if state is not None and index == first:
            trainer.restore(state)
        dataset = WindowDataset(
            photographs,
            settings.scene_share,
            phase.window,
            trainer.model.prompt_encoder.input_image_size[0],
            settings.objects,
            settings.seed + 1000 * index,
            phase.steps * phase.batch,
            teacher,
        )
        # The fused kernel's backward is slow where a few tokens attend to a few hundred.
        with sdpa_kernel(SDPBackend.MATH):
            run_phase(trainer, dataset, arguments.state)
        weights = trainer.average
    if rank() == 0:
        export(weights, arguments.out)


if __name__ == "__main__":
    main()
