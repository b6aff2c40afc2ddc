"""Counts against arithmetic by hand, file sizes and the paper's table."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from ptq4sam.cli import main
from ptq4sam.deploy.cost import Cost, count, meta_sam
from ptq4sam.deploy.operations import operations
from ptq4sam.deploy.size_report import size_report
from ptq4sam.errors import ConfigError
from ptq4sam.quantization.scheme import Scheme
from tests.tiny_runs import SCHEMES, SMALL, Quantized, run

pytest_plugins = ("tests.tiny_fixtures",)

BOXES = 3


@cache
def counted(name: str, scheme: str | None = None, boxes: int = 1) -> Cost:
    return count(name, None if scheme is None else exact(scheme), boxes=boxes)


def exact(scheme: str) -> Scheme:
    """A scheme that leaves in float32 what stays float, as the paper counts it."""
    return Scheme.from_yaml(SCHEMES / f"{scheme}.yaml").with_overrides("float_weights=float32")


def macs(cost: Cost) -> dict[str, int]:
    return {part.name: part.macs for part in cost.parts}


def test_vit_b_by_hand() -> None:
    # 64 x 64 tokens of 768 channels; windows of 14 x 14 cover 70 x 70: 25 of 196 tokens.
    tokens, padded, dim, grid = 4096, 25 * 196, 768, 64
    found = macs(counted("vit_b", boxes=BOXES))
    in_attention = 4 * tokens + 8 * padded
    assert found["patch embedding"] == tokens * 3 * 16 * 16 * dim
    assert found["encoder qkv"] == in_attention * dim * 3 * dim
    assert found["encoder proj"] == in_attention * dim * dim
    assert found["encoder MLP"] == 12 * 2 * tokens * dim * 4 * dim
    assert found["encoder attention, global"] == 4 * 2 * tokens * tokens * dim
    assert found["encoder attention in windows"] == 8 * 2 * padded * 196 * dim
    assert found["relative positions"] == 4 * tokens * 2 * grid * dim + 8 * padded * 2 * 14 * dim
    assert found["encoder neck"] == tokens * (dim * 256 + 9 * 256 * 256)


def test_the_decoder_of_vit_b_by_hand() -> None:
    # Seven tokens a box (IoU, four masks, two corners) and 4096 of the image, 256 channels; the
    # attentions to and from the image are 128 wide.
    n, m, wide, narrow = 7 * BOXES, 4096 * BOXES, 256, 128
    found = macs(counted("vit_b", boxes=BOXES))
    one_self = 4 * n * wide * wide
    one_cross = (2 * n + 2 * m) * wide * narrow
    assert found["decoder projections"] == 2 * one_self + 5 * one_cross
    assert found["decoder attention"] == 2 * 2 * 7 * n * wide + 5 * 2 * 7 * m * narrow
    assert found["decoder MLP"] == 2 * 2 * n * wide * 2048
    upscaling = m * 256 * 64 * 4 + 4 * m * 64 * 32 * 4
    hypernetworks = 4 * BOXES * (2 * 256 * 256 + 256 * 32)
    iou_head = BOXES * (2 * 256 * 256 + 256 * 4)
    product = BOXES * 4 * 32 * 256 * 256
    assert found["decoder heads"] == upscaling + hypernetworks + iou_head + product
    assert found["prompt encoder"] == 2 * (4096 + 2 * BOXES) * 128


@pytest.mark.parametrize(
    ("name", "encoder", "whole"),
    [("vit_b", 89.7, 93.7), ("vit_l", 308.3, 312.3), ("vit_h", 637.0, 641.1)],
)
def test_parameters_of_the_official_models(name: str, encoder: float, whole: float) -> None:
    parts = counted(name).parts
    found = sum(
        part.parameters
        for part in parts
        if part.name.startswith(("encoder", "patch", "position", "relative"))
    )
    assert round(found / 1e6, 1) == encoder
    assert round(counted(name).total.parameters / 1e6, 1) == whole
    # What every table calls 86, 303 and 631 million is the transformer alone.
    blocks = sum(part.parameters for part in parts if part.name.startswith("encoder"))
    layers = {"vit_b": 12 * 768**2 * 12, "vit_l": 12 * 1024**2 * 24, "vit_h": 12 * 1280**2 * 32}
    assert 0 < blocks - layers[name] < 0.03 * blocks


def test_float_models_cost_what_they_cost() -> None:
    cost = counted("vit_nano")
    assert cost.storage_ratio == cost.operations_ratio == cost.bit_operations_ratio == 1
    assert cost.total.weight_bytes == 4 * cost.total.parameters


def test_bits_count_where_they_are() -> None:
    plain, six = counted("vit_b"), counted("vit_b", "config66")
    assert macs(plain) == macs(six)
    float_parts = {part.name: part for part in plain.parts}
    for part in six.parts:
        before = float_parts[part.name]
        if part.name.startswith(("encoder attention", "encoder qkv", "encoder MLP", "decoder MLP")):
            assert part.bit_operations == part.macs * 36
            assert part.float_operations == pytest.approx(part.macs * 6 / 32)
            assert part.activation_bytes == before.float_activation_bytes * 6 / 32
        if part.name in ("patch embedding", "decoder heads", "prompt encoder"):
            assert (part.bit_operations, part.weight_bytes) == (
                before.macs * 1024,
                before.weight_bytes,
            )
    # The tables are float, the query that they meet is not.
    relative = next(part for part in six.parts if part.name == "relative positions")
    assert relative.bit_operations == relative.macs * 6 * 32
    assert relative.float_operations == relative.macs


def test_weights_take_their_bits_and_a_scale_a_channel() -> None:
    qkv = next(part for part in counted("vit_b", "config44").parts if part.name == "encoder qkv")
    weights, channels = 12 * 768 * 2304, 12 * 2304
    assert qkv.weight_bytes == weights // 2 + 5 * channels + 4 * channels  # and a float bias


def test_the_papers_ratios_at_six_bits() -> None:
    """PTQ4SAM states 4.9 times less storage and 3.9 times fewer operations."""
    assert round(counted("vit_l", "config66").storage_ratio, 1) == 4.9
    assert round(counted("vit_h", "config66").layers_ratio, 1) == 3.9


def test_a_sam_of_another_size_is_counted_at_that_size() -> None:
    own, small = macs(counted("vit_nano")), macs(count("vit_nano", image_size=128))
    # Half the side: a quarter of the patches, and global attention compares each with each.
    for part, ratio in (("encoder qkv", 4), ("encoder attention, global", 16)):
        assert ratio * small[part] == own[part]
    with pytest.raises(ConfigError, match="a multiple of its patches' 8"):
        count("vit_nano", image_size=100)


def test_exceptions_of_a_scheme_and_half_precision_count() -> None:
    scheme = exact("config44")
    whole = count("vit_nano", scheme).total
    unit = "image_encoder.blocks.3.attn"
    kept = count("vit_nano", scheme.with_units({unit: "float"})).total
    found = [one for one in operations(meta_sam("vit_nano")) if one.name.startswith(f"{unit}.")]
    quantized = sum(one.macs for one in found if "rel_pos" not in one.name)
    relative = sum(one.macs for one in found if "rel_pos" in one.name)
    assert kept.bit_operations - whole.bit_operations == (
        quantized * (1024 - 16) + relative * (1024 - 128)
    )
    halved = count("vit_nano", scheme.with_overrides("float_weights=float16")).total
    assert halved.weight_bytes < whole.weight_bytes
    assert halved.bit_operations == whole.bit_operations
    decoder = count("vit_nano", scheme, quantize_encoder=False).total
    assert whole.bit_operations < decoder.bit_operations


def test_bytes_are_those_of_a_file(quantized: Quantized) -> None:
    codes = sum(part.size for part in size_report(quantized.path).parts if "bits" in part.kind)
    parts = count(SMALL, exact("ptq4sam-s44")).parts
    values = sum(p.values for p in size_report(quantized.path).parts if "bits" in p.kind)
    with_codes = [part for part in parts if part.weight_bytes < part.float_weight_bytes]
    # Of these parts what is no code is biases, and scales and zero points a channel.
    rest = sum(part.weight_bytes for part in with_codes) - codes
    biases = sum(part.parameters for part in with_codes) - values
    channels = sum(
        weight.shape[0]
        for name, weight in meta_sam(SMALL).state_dict().items()
        if (
            any(f".{layer}.weight" in name for layer in ("qkv", "proj", "lin1", "lin2"))
            and "patch_embed" not in name
        )
        or "_proj.weight" in name
        or name in ("image_encoder.neck.0.weight", "image_encoder.neck.2.weight")
    )
    assert rest == 4 * biases + 5 * channels


def test_nothing_is_allocated() -> None:
    assert all(t.device == torch.device("meta") for t in meta_sam("vit_h").state_dict().values())


def test_the_command(capsys: pytest.CaptureFixture[str], quantized: Quantized) -> None:
    run("cost", "--scheme", SCHEMES / "ptq4sam-s44.yaml", "--file", quantized.path, "--boxes", 2)
    told = capsys.readouterr().out
    assert "encoder attention, global" in told
    assert "one picture, 2 boxes" in told
    assert "of its float32" in told or "scales, zero points, tau" in told
    run("cost", "--scheme", SCHEMES / "ptq4sam-s44.yaml", "--json")
    content = json.loads(capsys.readouterr().out)
    cost = count("vit_nano", Scheme.from_yaml(SCHEMES / "ptq4sam-s44.yaml"))
    assert content["total"]["macs"] == cost.total.macs
    assert content["operations_ratio"] == cost.operations_ratio
    assert main(["cost", "--model", "vit_x"]) == 2
    assert main(["cost", "--boxes", "0"]) == 2
