"""Train vit_nano, the small SAM that ships with the package, from a seed.

    python tools/train_vit_nano.py --coco IMAGES ANNOTATIONS --coco ... --out ptq4sam/assets/...

First on 128 px windows of SAM's 256 px input (same scale, a quarter of the work), then on whole
inputs. Without --coco it trains on generated scenes alone. A killed run resumes from --state.
`torchrun --nproc-per-node 2 tools/train_vit_nano.py ...` shares each batch between two processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from nano_data import Photographs, WindowDataset, collate
from nano_losses import sample_points, separation_loss, total_loss
from nano_model import build_model, resize_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptq4sam.allocator import keep_freed_memory

_log = logging.getLogger("train_vit_nano")

_DECAY = 0.999
_POINT_SHARE = 0.08
_REFINE_SHARE = 0.08


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training at one window size.

    The learning rate falls from the peak to the final one over all steps.
    """

    window: int
    batch: int
    steps: int
    peak_rate: float
    final_rate: float


PHASES = (
    Phase(128, 8, 8000, 1e-3, 5e-5),
    Phase(256, 4, 500, 2e-4, 1e-5),
)
"""Windows first, then whole inputs."""


def rate_at(phase: Phase, step: int) -> float:
    """Linear warm-up over 200 steps, then cosine from the peak to the final rate."""
    warm = min(1.0, (step + 1) / 200)
    cosine = 0.5 + 0.5 * np.cos(np.pi * step / phase.steps)
    return float(warm * (phase.final_rate + (phase.peak_rate - phase.final_rate) * cosine))


class Trainer:
    """Model, optimiser and moving average of one phase."""

    def __init__(self, phase: Phase, index: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.phase, self.index = phase, index
        self.model = build_model(phase.window).train()
        for parameter in self.model.parameters():
            if parameter.dim() == 4 and parameter.shape[0] == 1:
                torch.nn.init.normal_(parameter, std=0.02)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=phase.peak_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step = 0
        self.separation: list[float] = []
        self.early: list[float] = []
        self.overlap: list[float] = []
        self.features = torch.empty(0)
        self.model.mask_decoder.output_upscaling.register_forward_hook(self._keep_features)

    def _keep_features(self, _module: object, _inputs: object, output: Tensor) -> None:
        self.features = output

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Start from the averaged weights of an earlier phase."""
        moved = resize_encoder(state, self.model.state_dict())
        self.model.load_state_dict(moved)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def train_step(self, batch: tuple[Tensor, ...]) -> float:
        """One optimiser step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.phase, self.step)
        generator = torch.Generator().manual_seed(self.step)
        loss = self.loss(batch, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    def loss(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        """Loss of one batch: boxes mostly, at times points, at times a second pass with a mask."""
        pixels, boxes, masks, points, labels, owner, offsets = batch
        model = self.model
        # Before all that depends on the data, for processes must take the same branches.
        by_points, refine = (
            bool(torch.rand((), generator=generator) < share)
            for share in (_POINT_SHARE, _REFINE_SHARE)
        )
        embedding = self._embedding(pixels)[owner]
        stride = self.phase.window / (4 * embedding.shape[-1])
        target = F.avg_pool2d(masks[:, None].float() / 255, int(stride))[:, 0]
        shift = offsets[owner].float()
        positions = self._positions(offsets // 8, embedding.shape[-1])[owner]
        if by_points:
            clicks, kinds = sample_points(target, stride, generator)
            prompt = {"points": (clicks + shift[:, None], kinds)}
        else:
            prompt = {"boxes": boxes + shift.repeat(1, 2)}
        # Prompts stay in float32: bfloat16 would round a box to whole pixels.
        sparse = model.prompt_encoder(**prompt)[0]
        dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = dense.expand_as(embedding)
        with torch.autocast("cpu", torch.bfloat16):
            logits, ious = model.mask_decoder.predict_all(embedding, positions, sparse, dense)
        places = 2 * points / self.phase.window - 1
        loss, overlap = total_loss(logits.float(), ious.float(), places, labels)
        self.overlap.append(overlap)
        loss = loss + self._separation(embedding, target, boxes, stride)
        if refine:
            with torch.autocast("cpu", torch.bfloat16):
                dense = model.prompt_encoder.mask_downscaling(logits[:, :1].detach())
                logits, ious = model.mask_decoder.predict_all(embedding, positions, sparse, dense)
            loss = loss + total_loss(logits.float(), ious.float(), places, labels)[0]
        return loss

    def _embedding(self, pixels: Tensor) -> Tensor:
        model = self.model
        normalized = (pixels.float() - model.pixel_mean) / model.pixel_std
        normalized = torch.where(pixels < 0, 0.0, normalized)
        with torch.autocast("cpu", torch.bfloat16):
            return model.image_encoder(normalized)

    def _separation(
        self, embedding: Tensor, target: Tensor, boxes: Tensor, stride: float
    ) -> Tensor:
        coarse = F.avg_pool2d(target[:, None], 4)[:, 0]
        separation = separation_loss(self.features.float(), target, boxes, stride)
        early = separation_loss(embedding.float(), coarse, boxes, 4 * stride)
        self.separation.append(float(separation.detach()))
        self.early.append(float(early.detach()))
        return 2 * separation + early

    def _positions(self, cells: Tensor, size: int) -> Tensor:
        whole = self.model.prompt_encoder.dense_positions()[0]
        return torch.stack([whole[:, y : y + size, x : x + size] for x, y in cells.tolist()])

    def state(self) -> dict[str, object]:
        """Everything a resumed run needs."""
        return {
            "phase": self.index,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Continue from `state`."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])


def average_gradients(model: torch.nn.Module) -> None:
    """Give every process the mean of all gradients; processes take the same branches of a step."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
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


def run_phase(trainer: Trainer, dataset: WindowDataset, arguments: argparse.Namespace) -> None:
    """Train to the end of the phase, saving the state every few minutes."""
    phase = trainer.phase
    share = phase.batch // world_size()
    order = [
        step * phase.batch + rank() * share + index
        for step in range(trainer.step, phase.steps)
        for index in range(share)
    ]
    loader = torch.utils.data.DataLoader(
        dataset,
        share,
        sampler=order,
        collate_fn=collate,
        num_workers=1,
        prefetch_factor=8,
    )
    started, saved, losses = time.monotonic(), time.monotonic(), []
    for batch in loader:
        losses.append(trainer.train_step(batch))
        if trainer.step % 100 == 0 and rank() == 0:
            pace = (time.monotonic() - started) / len(losses)
            _log.info(
                "window %d step %d/%d loss %.3f IoU %.3f separation %.3f early %.3f, %.2f s a step",
                phase.window,
                trainer.step,
                phase.steps,
                float(np.mean(losses[-100:])),
                float(np.mean(trainer.overlap[-100:])),
                float(np.mean(trainer.separation[-100:])),
                float(np.mean(trainer.early[-100:])),
                pace,
            )
        if time.monotonic() - saved > 120 and rank() == 0:
            write_atomically(trainer.state(), arguments.state)
            saved = time.monotonic()
    if rank() == 0:
        write_atomically(trainer.state(), arguments.state)


def write_atomically(state: dict[str, object], path: Path) -> None:
    """Save through a temporary file, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(average: dict[str, Tensor], path: Path) -> None:
    """Write the averaged weights as float16 safetensors."""
    temporary = path.with_suffix(".tmp")
    save_file({k: v.to(torch.float16).contiguous() for k, v in average.items()}, temporary)
    os.replace(temporary, path)
    _log.info("wrote %s", path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco", nargs=2, action="append", default=[], type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors)")
    parser.add_argument("--state", type=Path, default=Path("train_vit_nano.pt"))
    parser.add_argument("--scene-share", type=float, default=0.4)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train all phases and export."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse_arguments()
    keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(arguments.threads)
    photographs = Photographs(arguments.coco) if arguments.coco else None
    _log.info("%d photographs", len(photographs) if photographs else 0)
    state = torch.load(arguments.state, weights_only=True) if arguments.state.exists() else None
    first = state["phase"] if state is not None else 0
    weights: dict[str, Tensor] | None = None
    if arguments.init is not None:
        weights = {name: value.float() for name, value in load_file(arguments.init).items()}
    for index, phase in enumerate(PHASES):
        if index < first:
            continue
        trainer = Trainer(phase, index, arguments.seed)
        if weights is not None:
            trainer.load_weights(weights)
        if state is not None and index == first:
            trainer.restore(state)
        dataset = WindowDataset(
            photographs,
            arguments.scene_share,
            phase.window,
            trainer.model.prompt_encoder.input_image_size[0],
            arguments.boxes,
            arguments.seed + 1000 * index,
            phase.steps * phase.batch,
        )
        # The fused kernel's backward is slow where a few tokens attend to a few hundred.
        with sdpa_kernel(SDPBackend.MATH):
            run_phase(trainer, dataset, arguments)
        weights = trainer.average
    if rank() == 0:
        export(weights, arguments.out)


if __name__ == "__main__":
    main()
