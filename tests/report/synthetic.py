"""Work directories of runs that never were: records of any size, in a blink."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ptq4sam.data import ImageRecord
from ptq4sam.evaluation.evaluate import Picture
from ptq4sam.evaluation.segmentation import Segmented
from ptq4sam.files import write_json
from ptq4sam.model.distributions import (
    AttentionRecord,
    ChannelRanges,
    Density,
    Distributions,
    Histogram,
    Keys,
    LayerRecord,
    Range,
    Softmax,
)
from ptq4sam.prompts import Prompts
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.record import PictureScore, RunRecord, UnitRecord
from ptq4sam.runs.recording import PictureRecorder
from ptq4sam.runs.run_log import ENDED
from tests.tiny_runs import SCHEMES

DECODER = "mask_decoder.transformer"
_CANDIDATES = (
    "layers.0.cross_attn_token_to_image",
    "layers.1.cross_attn_token_to_image",
    "final_attn_token_to_image",
)
_OTHERS = (
    "layers.0.self_attn",
    "layers.0.cross_attn_image_to_token",
    "layers.1.self_attn",
    "layers.1.cross_attn_image_to_token",
)


def write_run(
    folder: Path,
    *,
    model: str = "vit_nano",
    blocks: int = 1,
    channels: int = 64,
    pictures: int = 6,
    worst: int = 3,
    side: tuple[int, int] = (120, 160),
    large: bool = False,
) -> Path:
    """A run that has ended; `large`: with all parts, and pictures that nothing compresses."""
    rng = np.random.default_rng(0)
    scheme = Scheme.from_yaml(SCHEMES / "ptq4sam-l44.yaml")
    scores = {"AP": 31.5, "AP50": 52.1, "AR": 40.0, "mean_iou": 0.61}
    metrics = {
        "model": model,
        "quantized": True,
        **scores,
        "agreement": 0.81,
        "float": {name: value + (0.05 if value < 1 else 5) for name, value in scores.items()},
        "pictures": pictures,
        "masks": 7 * pictures,
        "audit": {"passed": True, "report": ["audit passed: 58 layers on their grids"]},
        "asked": {"quantize_encoder": True, "limit": None},
        "seed": 0,
        "versions": {"torch": "2"},
        "phases": {"evaluate": {"seconds": 3.5, "peak_memory_bytes": 2**30, "peak_cuda_bytes": 0}},
    }
    write_json(metrics, folder / "metrics.json")
    (folder / "scheme.yaml").write_text(scheme.to_yaml())
    (folder / "run.log").write_text(f"quantize ...\n{ENDED}: {folder / 'metrics.json'}\n")
    recorder = PictureRecorder(0.3)
    for number in range(worst):
        recorder(_picture(rng, number, side, large))
    units = _units(rng, blocks, large)
    RunRecord(
        distributions=_distributions(rng, blocks, channels, large),
        units=units,
        scores=tuple(_score(rng, number) for number in range(pictures)),
        threshold=0.3,
        worst=recorder.worst(),
    ).write(folder)
    return folder


def _score(rng: np.random.Generator, number: int) -> PictureScore:
    agreement, iou = rng.beta(8, 2), rng.beta(6, 3)
    return PictureScore(number, f"{number:012}.jpg", 7, agreement, iou, min(1, iou + 0.1))


def _picture(rng: np.random.Generator, number: int, side: tuple[int, int], noise: bool) -> Picture:
    height, width = side
    image = (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if noise
        else np.full((height, width, 3), 60 + 40 * number, np.uint8)
    )
    exact, found = np.zeros((2, 3, height, width), bool)
    for index in range(3):
        top, left = index * height // 4, index * width // 4
        exact[index, top : top + height // 3, left : left + width // 3] = True
        found[index, top : top + height // 3, left + width // 9 : left + width // 2] = True
    if noise:
        exact ^= rng.random(exact.shape) < 0.2
        found ^= rng.random(found.shape) < 0.2
    boxes = np.array([[5, 5, width / 2, height / 2]] * 3, np.float32)
    scored = np.array([0.9, 0.8, 0.7], np.float32)
    agreement = [0.1 + 0.05 * number] * 3
    return Picture(
        ImageRecord(number, Path(f"{number:012}.jpg"), width, height),
        image,
        Prompts(number, boxes, scored, np.ones(3, np.int64)),
        Segmented(found, scored, scored, np.zeros((len(found), 1, 1), np.float32)),
        Segmented(exact, scored, scored, np.zeros((len(exact), 1, 1), np.float32)),
        agreement,
        [0.5, 0.6, 0.7],
        [0.6, 0.7, 0.8],
    )


def _units(rng: np.random.Generator, blocks: int, large: bool) -> tuple[UnitRecord, ...]:
    names = [f"image_encoder.blocks.{b}.{unit}" for b in range(blocks) for unit in ("attn", "mlp")]
    names += [f"{DECODER}.{name}" for name in (*_CANDIDATES, *_OTHERS)] if large else []
    curve = 3 * np.exp(-np.arange(200) / 60) + rng.random(200)
    return tuple(UnitRecord(name, 4.0, 1.2, 20_000, False, tuple(curve)) for name in names)


def _distributions(
    rng: np.random.Generator, blocks: int, channels: int, large: bool
) -> Distributions:
    others = _OTHERS if large else ()
    attentions = [
        _attention(rng, f"image_encoder.blocks.{b}.attn", channels, False) for b in range(blocks)
    ]
    attentions += [_attention(rng, f"{DECODER}.{name}", 128, True) for name in _CANDIDATES]
    attentions += [_attention(rng, f"{DECODER}.{name}", 128, False) for name in others]
    layers = [
        LayerRecord(f"image_encoder.blocks.{b}.{name}", _channels(rng, channels), Range(4, -2, 2))
        for b in range(blocks)
        for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    ]
    layers += [
        LayerRecord(f"{DECODER}.{name}.{part}_proj", _channels(rng, 256), Range(4, -2, 2))
        for name in (*_CANDIDATES, *_OTHERS)
        for part in ("q", "k", "v", "out")
        if large
    ]
    return Distributions(tuple(attentions), tuple(layers))


def _attention(
    rng: np.random.Generator, name: str, channels: int, candidate: bool
) -> AttentionRecord:
    before = np.concatenate([rng.normal(-6, 1, 500), rng.normal(6, 1, 500)])
    after = np.abs(before)
    softmax, _ = np.histogram(rng.normal(-8, 3, 5000).clip(-24, 0), 96, (-24, 0))
    return AttentionRecord(
        name,
        candidate,
        _keys(rng, after, channels, candidate),
        Range(4, 2.0, 9.0),
        Softmax(Histogram(-24, 0, tuple(softmax.tolist())), 4, 0.9, 2),
        _keys(rng, before, channels, candidate) if name.startswith(DECODER) else None,
    )


def _keys(rng: np.random.Generator, values: np.ndarray, channels: int, candidate: bool) -> Keys:
    counts, edges = np.histogram(values, 96)
    density = None
    if candidate:
        heights = np.histogram(values, 128, density=True)[0]
        peaks = (-6.0, 6.0) if values.min() < 0 else (6.0,)
        density = Density(edges[0], edges[-1], tuple(heights.tolist()), peaks)
    histogram = Histogram(edges[0], edges[-1], tuple(counts.tolist()))
    return Keys(histogram, _channels(rng, channels), density)


def _channels(rng: np.random.Generator, channels: int) -> ChannelRanges:
    together = -(-channels // 256)
    high = rng.gamma(3, 1, -(-channels // together)).round(4)
    return ChannelRanges(channels, together, tuple((-high).tolist()), tuple(high.tolist()))
