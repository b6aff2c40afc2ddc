"""Trains the embedded scene detector on scenes generated on the fly.

Everything follows from the seed: scene i of step s, the sampling of that step and the initial
weights, so that a training that was killed goes on from its checkpoint as if it had not been.

    python tools/train_scene_detector.py --out work/scene_detector
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

# Before torch, which then knows how its threads wait.
from ptq4sam.data.scenes import Scene, generate_scene, write_scenes

# isort: split
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq4sam.prompts.scene_detector import SceneDetector, build_scene_detector, fold_batch_norms

logger = logging.getLogger("train_scene_detector")

WEIGHTS_NAME = "scene_detector.safetensors"
CHECKPOINT_NAME = "checkpoint.pt"


def parse_arguments(flags: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or the flags given instead of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and weights")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=int, default=8, help="scenes a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--bfloat16", action="store_true", help="convolutions in bfloat16 (faster where supported)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=math.inf,
        help="seconds after which this run stops at a checkpoint; the same command goes on",
    )  # fmt: skip
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument(
        "--evaluate", type=int, default=100, help="held-out scenes scored at the end"
    )
    return parser.parse_args(flags)


def example(scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
    """Image (3, H, W) in [0, 1] and torchvision's target of a scene."""
    image = torch.from_numpy(np.array(scene.image)).permute(2, 0, 1).float() / 255.0
    boxes = np.array([item.box for item in scene.instances], dtype=np.float32).reshape(-1, 4)
    labels = torch.tensor([item.category + 1 for item in scene.instances], dtype=torch.int64)
    return image, {"boxes": torch.from_numpy(boxes), "labels": labels}


def to_float32(value: Any) -> Any:
    """Tensors of a nested list, tuple or dictionary in float32."""
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, dict):
        return {key: to_float32(item) for key, item in value.items()}
    return type(value)(to_float32(item) for item in value)


def run_in_bfloat16(module: nn.Module) -> None:
    """Makes a module compute in bfloat16, weights and outputs staying float32."""
    forward = module.forward

    def wrapped(x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return to_float32(forward(x))

    module.forward = wrapped
    module.to(memory_format=torch.channels_last)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of weights and batch-norm statistics, quick at the start."""
    decay = min(0.998, (1 + step) / (10 + step))
    current = model.state_dict()
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[key], 1.0 - decay)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a half cosine down to nothing."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in one piece, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(arguments: argparse.Namespace) -> nn.Module | None:
    """Trains until the last step and returns the averaged model; None where time ran out."""
    torch.manual_seed(arguments.seed)
    model = build_scene_detector(folded=False)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, weight_decay=arguments.weight_decay
    )
    path = arguments.out / CHECKPOINT_NAME
    first = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
        logger.info("going on from step %d of %s", first, path)
    if arguments.bfloat16:
        run_in_bfloat16(model.backbone)
        run_in_bfloat16(model.rpn.head)
    started = time.monotonic()
    recent: dict[str, float] = {}
    model.train()
    for step in range(first, arguments.steps):
        losses = _step(model, optimizer, step, arguments)
        update_average(average, model, step)
        for key, value in losses.items():
            recent[key] = recent.get(key, value) * 0.95 + value * 0.05
        elapsed = time.monotonic() - started
        stop = elapsed > arguments.time_limit
        if stop or (step + 1) % arguments.checkpoint_every == 0 or step + 1 == arguments.steps:
            save_checkpoint(
                path,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
        if (step + 1) % 20 == 0:
            remaining = elapsed / (step + 1 - first) * (arguments.steps - step - 1)
            parts = " ".join(f"{key} {value:.3f}" for key, value in recent.items())
            logger.info("step %d, %.0f s left: %s", step + 1, remaining, parts)
        if stop and step + 1 < arguments.steps:
            logger.info("time limit reached after step %d; run the same command to go on", step + 1)
            return None
    return average


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, arguments: argparse.Namespace
) -> dict[str, float]:
    # Seeding every step, rather than once, is what lets a resumed run repeat an unbroken one.
    torch.manual_seed(arguments.seed * 1_000_003 + step)
    examples = [
        example(generate_scene(np.random.default_rng([arguments.seed, step, index])))
        for index in range(arguments.batch_size)
    ]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
    losses: dict[str, Tensor] = model(
        [item[0] for item in examples], [item[1] for item in examples]
    )
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return {key.removeprefix("loss_"): value.item() for key, value in losses.items()}


def save_weights(model: nn.Module, path: Path) -> None:
    """Folds the batch norms and writes float16 safetensors in one piece."""
    fold_batch_norms(model)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    temporary = path.with_suffix(".partial")
    save_file(weights, temporary)
    os.replace(temporary, path)


def evaluate(weights: Path, directory: Path, count: int) -> dict[str, float]:
    """Box AP (in %) and seconds an image on scenes that training never sees."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, annotations = write_scenes(directory, count, seed=2024, split="val")
    detector = SceneDetector(weights)
    results: list[dict[str, Any]] = []
    seconds = 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        for record in truth.dataset["images"]:
            image = np.asarray(Image.open(images / record["file_name"]))
            started = time.monotonic()
            boxes, scores, categories = detector.detect(image)
            seconds += time.monotonic() - started
            boxes[:, 2:] -= boxes[:, :2]
            results += [
                {
                    "image_id": record["id"],
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "score": float(score),
                }
                for box, score, category in zip(boxes, scores, categories, strict=True)
            ]
        scorer = COCOeval(truth, truth.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    metrics = {name: 100.0 * float(scorer.stats[index]) for index, name in enumerate(names)}
    return metrics | {"seconds_per_image": seconds / count}


def main() -> None:
    """Trains, writes the weights and scores them."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = train(arguments)
    if model is None:
        return
    weights = arguments.out / WEIGHTS_NAME
    save_weights(model, weights)
    logger.info("wrote %s, %.2f MB", weights, weights.stat().st_size / 1e6)
    if arguments.evaluate > 0:
        metrics = evaluate(weights, arguments.out / "scenes", arguments.evaluate)
        logger.info(" ".join(f"{key} {value:.3f}" for key, value in metrics.items()))


if __name__ == "__main__":
    main()
