"""Names and shapes of the tensors in the published weights, as their authors' code makes them.

Written down from the authors' modules, not from ours: `{0..5}` counts, `{a,b}` lists. Heads that
several modules hold are in a state dict once for each of them.
"""

from __future__ import annotations

import itertools
import re

Shape = tuple[int, ...]
Layout = dict[str, Shape]


def expand(pattern: str) -> list[str]:
    """All names of a pattern."""
    pieces = re.split(r"\{(.*?)\}", pattern)
    choices = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            choices.append([piece])
        elif ".." in piece:
            first, last = map(int, piece.split(".."))
            choices.append([str(number) for number in range(first, last + 1)])
        else:
            choices.append(piece.split(","))
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _write(layout: Layout, pattern: str, *shape: int) -> None:
    for name in expand(pattern):
        assert name not in layout
        layout[name] = shape


def _linear(layout: Layout, pattern: str, outputs: int, inputs: int) -> None:
    _write(layout, pattern + ".weight", outputs, inputs)
    _write(layout, pattern + ".bias", outputs)


def _norm(layout: Layout, pattern: str, channels: int) -> None:
    _write(layout, pattern + ".{weight,bias}", channels)


def _box_head(layout: Layout, pattern: str) -> None:
    _linear(layout, pattern + ".layers.{0,1}", 256, 256)
    _linear(layout, pattern + ".layers.2", 4, 256)


def _transformer(layout: Layout, levels: int) -> None:
    samples = 8 * levels * 4
    encoder, decoder = "transformer.encoder.layers.{0..5}", "transformer.decoder.layers.{0..5}"
    for attention in (encoder + ".self_attn", decoder + ".cross_attn"):
        _linear(layout, attention + ".sampling_offsets", samples * 2, 256)
        _linear(layout, attention + ".attention_weights", samples, 256)
        _linear(layout, attention + ".{value_proj,output_proj}", 256, 256)
    _write(layout, decoder + ".self_attn.in_proj_weight", 768, 256)
    _write(layout, decoder + ".self_attn.in_proj_bias", 768)
    _linear(layout, decoder + ".self_attn.out_proj", 256, 256)
    for layer, norms in ((encoder, "{1,2}"), (decoder, "{1,2,3}")):
        _linear(layout, layer + ".linear1", 2048, 256)
        _linear(layout, layer + ".linear2", 256, 2048)
        _norm(layout, layer + f".norm{norms}", 256)
    _write(layout, "transformer.level_embed", levels, 256)
    _linear(layout, "transformer.enc_output", 256, 256)
    _norm(layout, "transformer.enc_output_norm", 256)


def _projections(layout: Layout, channels: list[int]) -> None:
    for level, width in enumerate(channels):
        _write(layout, f"input_proj.{level}.0.weight", 256, width, 1, 1)
    last = len(channels)
    _write(layout, f"input_proj.{last}.0.weight", 256, channels[-1], 3, 3)
    _write(layout, f"input_proj.{{0..{last}}}.0.bias", 256)
    _norm(layout, f"input_proj.{{0..{last}}}.1", 256)


def hdetr_r50() -> Layout:
    """r50_hybrid_branch_lambda1_group6_t1500_..._two_stage_36eps.pth."""
    layout: Layout = {}
    statistics = ".{weight,bias,running_mean,running_var}"
    body = "backbone.0.body"
    _write(layout, f"{body}.conv1.weight", 64, 3, 7, 7)
    _write(layout, f"{body}.bn1" + statistics, 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        layer = f"{body}.layer{stage}"
        every, later = f"{layer}.{{0..{blocks - 1}}}", f"{layer}.{{1..{blocks - 1}}}"
        _write(layout, f"{layer}.0.conv1.weight", width, inputs, 1, 1)
        _write(layout, f"{later}.conv1.weight", width, 4 * width, 1, 1)
        _write(layout, f"{every}.conv2.weight", width, width, 3, 3)
        _write(layout, f"{every}.conv3.weight", 4 * width, width, 1, 1)
        _write(layout, f"{every}.bn{{1,2}}" + statistics, width)
        _write(layout, f"{every}.bn3" + statistics, 4 * width)
        _write(layout, f"{layer}.0.downsample.0.weight", 4 * width, inputs, 1, 1)
        _write(layout, f"{layer}.0.downsample.1" + statistics, 4 * width)
        inputs = 4 * width
    _projections(layout, [512, 1024, 2048])
    _transformer(layout, levels=4)
    _linear(layout, "transformer.pos_trans", 512, 512)
    _norm(layout, "transformer.pos_trans_norm", 512)
    for holder in ("", "transformer.decoder."):
        _linear(layout, holder + "class_embed.{0..6}", 91, 256)
        _box_head(layout, holder + "bbox_embed.{0..6}")
    _write(layout, "query_embed.weight", 1800, 256)
    return layout


def focalnet_dino_l() -> Layout:
    """focalnet_large_fl4_o365_finetuned_on_coco.pth."""
    layout: Layout = {}
    net = "backbone.0"
    _write(layout, f"{net}.patch_embed.proj.weight", 192, 3, 7, 7)
    _write(layout, f"{net}.patch_embed.proj.bias", 192)
    _norm(layout, f"{net}.patch_embed.norm", 192)
    for stage, (blocks, width) in enumerate(((2, 192), (2, 384), (18, 768), (2, 1536))):
        block = f"{net}.layers.{stage}.blocks.{{0..{blocks - 1}}}"
        _norm(layout, f"{block}.norm{{1,2}}", width)
        _write(layout, f"{block}.gamma_{{1,2}}", width)
        _linear(layout, f"{block}.modulation.f", 2 * width + 5, width)
        _write(layout, f"{block}.modulation.h.weight", width, width, 1, 1)
        _write(layout, f"{block}.modulation.h.bias", width)
        _linear(layout, f"{block}.modulation.proj", width, width)
        for level, side in enumerate((3, 5, 7, 9)):
            name = f"{block}.modulation.focal_layers.{level}.0.weight"
            _write(layout, name, width, 1, side, side)
        _linear(layout, f"{block}.mlp.fc1", 4 * width, width)
        _linear(layout, f"{block}.mlp.fc2", width, 4 * width)
        _norm(layout, f"{net}.norm{stage}", width)
        if stage < 3:
            down = f"{net}.layers.{stage}.downsample"
            _write(layout, f"{down}.proj.weight", 2 * width, width, 3, 3)
            _write(layout, f"{down}.proj.bias", 2 * width)
            _norm(layout, f"{down}.norm", 2 * width)
    _projections(layout, [192, 384, 768, 1536])
    _transformer(layout, levels=5)
    _norm(layout, "transformer.decoder.norm", 256)
    _linear(layout, "transformer.decoder.ref_point_head.layers.0", 256, 512)
    _linear(layout, "transformer.decoder.ref_point_head.layers.1", 256, 256)
    _write(layout, "transformer.tgt_embed.weight", 900, 256)
    _linear(layout, "transformer.enc_out_class_embed", 91, 256)
    _box_head(layout, "transformer.enc_out_bbox_embed")
    for holder in ("", "transformer.decoder."):
        _linear(layout, holder + "class_embed.{0..5}", 91, 256)
        _box_head(layout, holder + "bbox_embed.{0..5}")
    _write(layout, "label_enc.weight", 92, 256)
    return layout
