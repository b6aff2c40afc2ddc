from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq4sam.deploy.codes import layer_codes
from ptq4sam.deploy.container import CHECKSUM, DESCRIPTION, signed
from ptq4sam.deploy.storage import load, save
from ptq4sam.errors import CheckpointError, ConfigError, DeployError
from ptq4sam.model.audit import audit
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.operators.base import quantized_layers
from ptq4sam.quantization.modes import quantizers
from ptq4sam.sam.model import Sam

Forward = Callable[[Sam], tuple[Tensor, ...]]
Quantize = Callable[..., QuantizedSam]

SIGNED = {
    "a_qconfig": {
        "quantizer": "LSQFakeQuantize",
        "observer": "MinMaxObserver",
        "bit": 6,
        "symmetric": True,
    },
    "w_qconfig": {
        "quantizer": "FixedFakeQuantize",
        "observer": "MinMaxObserver",
        "bit": 5,
        "symmetric": True,
        "ch_axis": -1,
    },
    "ptq4sam": {"BIG": False, "AGQ": False},
}
LEARNED_ZERO_POINT = {
    "a_qconfig": {"quantizer": "LSQPlusFakeQuantize", "observer": "AvgMinMaxObserver", "bit": 4}
}


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """As torch.equal, but -0.0 is not 0.0."""
    return ours.dtype == theirs.dtype and torch.equal(
        ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
    )


def assert_round_trip(quantized: QuantizedSam, forward: Forward, path: Path) -> QuantizedSam:
    save(quantized, path)
    loaded = load(path)
    expected, state = quantized.state_dict(), loaded.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not same_bits(state[name], expected[name])] == []
    assert all(map(same_bits, forward(loaded), forward(quantized)))
    return loaded


@pytest.mark.parametrize("steps", [0, 3], ids=["calibrated", "reconstructed"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_load_gives_the_same_bits(
    quantize: Quantize, forward: Forward, tmp_path: Path, bits: int, steps: int
) -> None:
    assert_round_trip(quantize(bits, steps), forward, tmp_path / "model.safetensors")


@pytest.mark.parametrize("scheme", [SIGNED, LEARNED_ZERO_POINT], ids=["signed", "zero point"])
def test_other_number_formats(
    quantize: Quantize, forward: Forward, tmp_path: Path, scheme: dict[str, object]
) -> None:
    quantized = quantize(4, **scheme)
    for _, quantizer in quantizers(quantized):
        if isinstance(quantizer.zero_point, torch.nn.Parameter):
            quantizer.zero_point.add_(0.3)
    assert_round_trip(quantized, forward, tmp_path / "model.safetensors")


def test_decoder_only_into_a_new_folder(
    quantize: Quantize, forward: Forward, tmp_path: Path
) -> None:
    quantized = quantize(4, 3, encoder=False)
    loaded = assert_round_trip(quantized, forward, tmp_path / "deep" / "model.safetensors")
    assert loaded.scheme == quantized.scheme
    assert loaded.encoder_quantized is False
    assert loaded.folded == quantized.folded
    assert audit(loaded, lambda: forward(loaded)).passed
    assert [path.name for path in tmp_path.rglob("*.*")] == ["model.safetensors"]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_file_holds_codes_alone(quantize: Quantize, tmp_path: Path, bits: int) -> None:
    quantized = quantize(bits)
    save(quantized, tmp_path / "model.safetensors")
    held = load_file(tmp_path / "model.safetensors")
    for name, layer in quantized_layers(quantized):
        assert f"{name}.weight" not in held
        packed = held[f"{name}.weight.codes"]
        assert packed.dtype == torch.uint8
        assert len(packed) == layer.weight.numel() * bits // 8
        # The first code of a stream is in the lowest bits of its first byte.
        assert int(packed[0]) & ((1 << bits) - 1) == int(layer_codes(layer).codes.flatten()[0])
    assert not any(name.endswith((".alpha", ".calibrated")) for name in held)


def test_a_file_of_the_unpacked_format_is_read(
    quantize: Quantize, forward: Forward, tmp_path: Path, describe: Callable[[Path], str]
) -> None:
    """As ptq4sam wrote it before packing: the state as it is, and a description."""
    quantized = quantize(4, 3)
    path = tmp_path / "model.safetensors"
    save(quantized, path)
    text = describe(path).replace('"format_version": 4', '"format_version": 1')
    state = {name.replace(".core.", "."): value for name, value in quantized.state_dict().items()}
    save_file(state, path, metadata={DESCRIPTION: text})
    assert all(map(same_bits, forward(load(path)), forward(quantized)))


def test_a_file_from_before_attentions_had_cores_is_read(
    quantize: Quantize, forward: Forward, tmp_path: Path, describe: Callable[[Path], str]
) -> None:
    """As ptq4sam wrote it in format version 3: quantizers were named below the attention."""
    quantized = quantize(4)
    path = tmp_path / "model.safetensors"
    save(quantized, path)
    content = json.loads(describe(path))
    del content[CHECKSUM]
    checksums = {n.replace(".core.", "."): value for n, value in content["checksums"].items()}
    text = signed({**content, "format_version": 3, "checksums": checksums})
    tensors = {name.replace(".core.", "."): value for name, value in load_file(path).items()}
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path, metadata={DESCRIPTION: text})
    assert all(map(same_bits, forward(load(path)), forward(quantized)))


def test_half_precision_halves_what_stays_float(
    quantize: Quantize, forward: Forward, tmp_path: Path
) -> None:
    whole = quantize(4, float_weights="float32")
    half = quantize(4, float_weights="float16")
    assert not torch.equal(whole.image_encoder.pos_embed, half.image_encoder.pos_embed)
    for name, model in {"whole": whole, "half": half}.items():
        assert_round_trip(model, forward, tmp_path / f"{name}.safetensors")
    held = load_file(tmp_path / "half.safetensors")
    floats = {name for name, tensor in held.items() if tensor.dtype == torch.float16}
    assert {
        "image_encoder.pos_embed",
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.blocks.0.attn.rel_pos_h",
        "mask_decoder.output_upscaling.0.weight",
        "mask_decoder.iou_prediction_head.layers.0.weight",
    } <= floats
    assert held["image_encoder.blocks.0.attn.qkv.weight_quantizer.scale"].dtype == torch.float32
    assert held["image_encoder.blocks.0.attn.qkv.bias"].dtype == torch.float32


def test_compat_published_is_not_saved(quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compat: published"):
        save(quantize(4, 2, compat="published"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_weight_off_its_grid_is_not_saved(quantize: Quantize, tmp_path: Path) -> None:
    quantized = quantize()
    quantized.image_encoder.neck[0].weight[0, 0] += 1e-3
    with pytest.raises(DeployError, match="is not on its grid"):
        save(quantized, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_another_model_or_scheme_than_the_tensors(
    quantize: Quantize, tmp_path: Path, rewrite: Callable[..., None], bits: int
) -> None:
    path = tmp_path / "model.safetensors"
    quantized = quantize(bits)
    for changes in (
        {"model": "vit_nano"},
        {"encoder_quantized": False},
        {"scheme": quantized.scheme.with_overrides("w_qconfig.bit=5").to_dict()},
    ):
        save(quantized, path)
        rewrite(path, **changes)
        with pytest.raises(CheckpointError, match="does not hold the model it names"):
            load(path)


@pytest.mark.parametrize(
    "changes", [{"model": "vit_x"}, {"scheme": {"new": 1}}, {"folded": None}], ids=str
)
def test_a_description_that_this_version_does_not_know(
    quantize: Quantize, tmp_path: Path, rewrite: Callable[..., None], changes: dict[str, object]
) -> None:
    save(quantize(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", **changes)
    with pytest.raises(CheckpointError, match="describes no model that this ptq4sam"):
        load(tmp_path / "model.safetensors")
