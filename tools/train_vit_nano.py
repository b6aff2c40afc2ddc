"""Train vit_nano from masks, from a seed or from weights; other small SAMs: ptq4sam distil.

    python tools/train_vit_nano.py tools/vit_nano.yaml --data FOLDER --out FILE.safetensors

The file says what it learns from and for how long. A killed run resumes from --state, with the same
bits on a CPU. `torchrun --nproc-per-node 2 tools/train_vit_nano.py ...` shares each batch between
two processes.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Before torch, which then knows how its threads wait.
import ptq4sam  # noqa: F401

# isort: split
import numpy as np
import torch
from nano_data import STRIDE, WindowDataset, Windows, collate
from nano_losses import feature_loss, separation_loss, total_loss
from nano_model import build_model, resize_encoder
from nano_teacher import DetectorFeatures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4sam import parallel
from ptq4sam.allocator import keep_freed_memory
from ptq4sam.distillation.losses import measured_iou
from ptq4sam.distillation.pictures import Photographs
from ptq4sam.distillation.prompts import Prompts
from ptq4sam.distillation.settings import Phase, Source
from ptq4sam.distillation.trainer import one_order, plain_attention
from ptq4sam.files import replacing
from ptq4sam.operators.norm import LayerNorm2d
from ptq4sam.records import Record
from ptq4sam.yaml_files import read_yaml

_log = logging.getLogger("train_vit_nano")

_DECAY = 0.999
_BOX_SHARE = 0.55
_ROUNDS = (1.0, 0.35, 0.35)
_FEATURE_CHANNELS = 192
_AUXILIARY = "foretold."


@dataclass(frozen=True)
class WindowPhase(Phase):
    """One stretch of training at one window size; the terms of its loss are this program's own."""

    window: int = 256


@dataclass(frozen=True)
class Detector(Record):
    """A detector as ONNX, and the names of its feature maps."""

    file: Path
    maps: tuple[str, ...]


@dataclass(frozen=True)
class Settings(Record):
    """What a settings file holds; paths are below --data."""

    phases: tuple[WindowPhase, ...]
    sources: tuple[Source, ...] = ()
    detector: Detector | None = None
    objects: int = 6
    scene_share: float = 0.25
    seed: int = 0


class Trainer:
    """Model, optimiser and moving average of one phase."""

    def __init__(self, phase: WindowPhase, index: int, seed: int, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.phase, self.index, self.device = phase, index, torch.device(device)
        self.model = build_model(phase.window).train()
        for parameter in self.model.parameters():
            if parameter.dim() == 4 and parameter.shape[0] == 1:
                nn.init.normal_(parameter, std=0.02)
        neck = self.model.image_encoder.neck[0]
        self.foretell = nn.Sequential(
            LayerNorm2d(neck.in_channels), nn.Conv2d(neck.in_channels, _FEATURE_CHANNELS, 1)
        )
        self.model.to(self.device)
        self.foretell.to(self.device)
        self.trained = [*self.model.parameters(), *self.foretell.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.trained if p.dim() > 1], "weight_decay": 0.05},
                {"params": [p for p in self.trained if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=phase.rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.average = {k: v.detach().clone() for k, v in self._weights().items()}
        self.step = 0
        self.log: dict[str, list[float]] = defaultdict(list)
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

    def train_step(self, batch: Windows) -> float:
        """One optimiser step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.rate_at(self.step)
        generator = torch.Generator().manual_seed(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        with plain_attention(self.device):
            loss = self.loss(batch.to(self.device), generator)
            with one_order(self.device):
                loss.backward()
        # Processes take the same branches of a step: the same parameters have gradients.
        parallel.average([p.grad for p in self.trained if p.grad is not None])
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self._weights().items():
                self.average[name].lerp_(value, 1 - decay)
        self.log["loss"].append(float(loss.detach()))
        return self.log["loss"][-1]

    def loss(self, batch: Windows, generator: torch.Generator) -> Tensor:
        """Loss of one batch: all objects once, some again with one more click and the mask."""
        embedding, views = self._embedding(batch.pixels), batch.views
        loss = self._foretold(batch)
        side = self.phase.window
        prompts = Prompts.first(views.boxes, views.target, STRIDE, side, _BOX_SHARE, generator)
        chosen = torch.arange(len(views.boxes), device=self.device)
        logits: Tensor | None = None
        for number, share in enumerate(_ROUNDS):
            if number:
                kept = torch.randperm(len(chosen), generator=generator)
                kept = kept[: max(1, round(share * len(chosen)))].to(self.device)
                chosen, logits = chosen[kept], logits[kept]
                prompts = prompts[kept].refined(
                    logits[:, 0], views.target[chosen], STRIDE, generator
                )
            masks, ious, truth, term = self._round(batch, embedding, prompts, chosen, logits)
            loss = loss + term * (1.0 if number == 0 else share)
            if number == 0:
                loss = loss + self._separation(batch, embedding)
            self._note_round(number, prompts.by_box, ious, truth)
            best = 1 + ious[:, 1:].argmax(1)
            picked = torch.where(prompts.lone, best, torch.zeros_like(best))
            logits = masks[torch.arange(len(masks)), picked][:, None].detach()
        return loss

    def _round(
        self,
        batch: Windows,
        embedding: Tensor,
        prompts: Prompts,
        chosen: Tensor,
        logits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masks of some objects, their predicted and measured IoUs, and the loss."""
        views, encoder = batch.views, self.model.prompt_encoder
        owner = views.owner[chosen]
        features = embedding[owner]
        # Prompts stay in float32: bfloat16 would round a box to whole pixels.
        sparse = prompts.moved(batch.offsets[owner].float()).embedded(encoder)
        if logits is None:
            dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(features)
        else:
            dense = encoder.mask_downscaling(logits)
        positions = self._positions(batch.offsets // 8, embedding.shape[-1])[owner]
        with torch.autocast(self.device.type, torch.bfloat16):
            masks, ious = self.model.mask_decoder.predict_all(features, positions, sparse, dense)
        masks, ious = masks.float(), ious.float()
        places, labels = 2 * views.points[chosen] / self.phase.window - 1, views.labels[chosen]
        where = (places, labels, views.boxes[chosen], views.seen[owner], STRIDE)
        truth = measured_iou(masks, *where)
        return masks, ious, truth, total_loss(masks, ious, places, labels, truth, prompts.lone)

    def _embedding(self, pixels: Tensor) -> Tensor:
        model = self.model
        normalized = (pixels.float() - model.pixel_mean) / model.pixel_std
        with torch.autocast(self.device.type, torch.bfloat16):
            return model.image_encoder(torch.where(pixels < 0, 0.0, normalized))

    def _foretold(self, batch: Windows) -> Tensor:
        if batch.features.shape[1] == 0:
            return torch.zeros((), device=self.device)
        loss = feature_loss(self.foretell(self._blocks.float()), batch.features.float())
        self.log["features"].append(float(loss.detach()))
        return loss

    def _separation(self, batch: Windows, embedding: Tensor) -> Tensor:
        views = batch.views
        coarse = F.avg_pool2d(views.target[:, None], 4)[:, 0]
        early = separation_loss(embedding[views.owner].float(), coarse, views.boxes, 4 * STRIDE)
        return early + separation_loss(self._upscaled.float(), views.target, views.boxes, STRIDE)

    def _positions(self, cells: Tensor, size: int) -> Tensor:
        whole = self.model.prompt_encoder.dense_positions()[0]
        return torch.stack([whole[:, y : y + size, x : x + size] for x, y in cells.tolist()])

    def _note_round(self, number: int, by_box: Tensor, ious: Tensor, truth: Tensor) -> None:
        """Write down how good a round's masks are, and how wrong their predicted IoUs."""
        best = truth.gather(1, 1 + ious[:, 1:].argmax(1, keepdim=True))[:, 0]
        for name, chosen, values in (
            (f"box{number}", by_box, truth[:, 0]),
            (f"click{number}", ~by_box, best if number == 0 else truth[:, 0]),
        ):
            if chosen.any():
                self.log[name].append(float(values[chosen].mean()))
        self.log["off"].append(float((ious.detach() - truth).abs().mean()))

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


def run_phase(trainer: Trainer, dataset: WindowDataset, state: Path) -> None:
    """Train to the end of the phase, saving the state every few minutes."""
    phase = trainer.phase
    share = phase.batch // parallel.count()
    order = [
        step * phase.batch + parallel.rank() * share + index
        for step in range(trainer.step, phase.steps)
        for index in range(share)
    ]
    loader = torch.utils.data.DataLoader(
        dataset, share, sampler=order, collate_fn=collate, num_workers=1, prefetch_factor=8
    )
    saved = time.monotonic()
    for batch in loader:
        trainer.train_step(batch)
        if trainer.step % 100 == 0 and parallel.is_first():
            told = " ".join(f"{name} {np.mean(all_):.3f}" for name, all_ in trainer.log.items())
            _log.info("window %d step %d/%d %s", phase.window, trainer.step, phase.steps, told)
            trainer.log.clear()
        ends = trainer.step == phase.steps
        if (ends or time.monotonic() - saved > 120) and parallel.is_first():
            with replacing(state) as temporary:
                torch.save(trainer.state(), temporary)
            saved = time.monotonic()


def export(average: dict[str, Tensor], path: Path) -> None:
    """Write the averaged weights as float16 safetensors."""
    own = {k: v for k, v in average.items() if not k.startswith(_AUXILIARY)}
    with replacing(path) as temporary:
        save_file({k: v.to(torch.float16).contiguous() for k, v in own.items()}, temporary)
    _log.info("wrote %s", path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the sources")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors)")
    parser.add_argument("--state", type=Path, default=Path("train_vit_nano.pt"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Train all phases and export."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse_arguments()
    settings = Settings.from_dict(read_yaml(arguments.settings, "settings"), arguments.settings)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    with parallel.joined():
        train(settings, arguments)


def train(settings: Settings, arguments: argparse.Namespace) -> None:
    """All phases, from the state where there is one."""
    sources = [source.below(arguments.data) for source in settings.sources]
    photographs = Photographs(sources) if sources else None
    teacher = None
    if settings.detector is not None:
        file = arguments.data / settings.detector.file
        teacher = DetectorFeatures(file, settings.detector.maps)
    state = torch.load(arguments.state, weights_only=True) if arguments.state.exists() else None
    first = state["phase"] if state is not None else 0
    weights: dict[str, Tensor] | None = None
    if arguments.init is not None:
        weights = {name: value.float() for name, value in load_file(arguments.init).items()}
    for index, phase in enumerate(settings.phases):
        if index < first:
            continue
        trainer = Trainer(phase, index, settings.seed, arguments.device)
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
        run_phase(trainer, dataset, arguments.state)
        weights = trainer.average
    if parallel.is_first():
        export(weights, arguments.out)


if __name__ == "__main__":
    main()
